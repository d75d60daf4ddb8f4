"""Finds linear layers whose LoRA adapter compiled layers can fuse into the matrix product, and calls the fused halves.

Every other adapter runs as peft's own module. R rows, r the adapters' rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vl3train.model.attention.backends import Segments
from vl3train.model.kernels.gemm_ops import linear_add
from vl3train.model.layers.lora_halves import AdaptedNormAttention, AdaptedSwigluMlp
from vl3train.model.layers.nf4_linear import Nf4Linear, Nf4Product

RANK_MULTIPLE = 8
"""Ranks must be multiples of this: the kernels need rows that begin at multiples of 16 bytes."""


class Adapter(NamedTuple):
    """One linear layer with its adapter."""

    weight: Tensor  # (out, in), frozen; or the bytes of one in 4 bits (model/kernels/nf4.py)
    bias: Tensor | None  # (out,), frozen
    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    scaling: float


def adapter_of(module: Any) -> Adapter | None:
    """The adapter of a lora.Linear of peft; None unless it is exactly one plain adapter, active and not merged."""
    name = "default"
    if not hasattr(module, "lora_A") or type(module.base_layer) not in (nn.Linear, Nf4Linear):
        return None
    if module.merged or module.disable_adapters or list(module.active_adapters) != [name]:
        return None
    if len(module.lora_variant) or type(module.lora_dropout[name]) is not nn.Identity:
        return None
    base, a, b = module.base_layer, module.lora_A[name], module.lora_B[name]
    in_4_bits = type(base) is Nf4Linear
    weight = base.packed if in_4_bits else base.weight
    frozen = not weight.requires_grad and (base.bias is None or not base.bias.requires_grad)
    if not frozen or b.bias is not None or len(a.weight) % RANK_MULTIPLE:
        return None
    if a.weight.dtype != b.weight.dtype or not (in_4_bits or b.weight.dtype == weight.dtype):
        return None  # peft computes such an adapter in its own dtype
    return Adapter(weight, base.bias, a.weight, b.weight, module.scaling[name])


def adapters_of(rows: Tensor, *modules: nn.Module) -> list[Adapter] | None:
    """The adapters of ``modules``; None unless all have one, with the same scaling, in a compiled backward pass."""
    found = [adapter_of(module) for module in modules]
    adapters = [adapter for adapter in found if adapter is not None]
    if not (torch.compiler.is_compiling() and rows.requires_grad and len(adapters) == len(found)):
        return None
    return adapters if all(adapter.scaling == adapters[0].scaling for adapter in adapters) else None


def adapted_add(rows: Tensor, linear: nn.Module, added: Tensor) -> Tensor:
    """F.linear with its adapter, plus ``added`` (R, out). Differentiable in all but the frozen weight."""
    weight, bias, a, b, scaling = _parts(rows, [linear])
    inner = rows @ a[0].t() * scaling
    added = torch.addmm(added, inner, b[0].t())
    if weight[0].dtype is torch.uint8:
        return Nf4Product.apply(rows, weight[0], bias[0], len(b[0]), added)
    return linear_add(rows, weight[0], bias[0], added)


def adapted_mlp(rows: Tensor, norm: Any, linears: Sequence[nn.Module], level: str) -> Tensor:
    """Norm, MLP and residual: ``rows`` (R, W) -> (R, W). ``linears`` are gate, up and down."""
    weights, _, a, b, scaling = _parts(rows, linears)
    return AdaptedSwigluMlp.apply(rows, norm.weight, norm.variance_epsilon, level, scaling, *weights, *a, *b)


def adapted_attention(
    rows: Tensor, norm: Any, linears: Sequence[nn.Module], attention: Any, cos_sin: Tensor, segments: Segments
) -> tuple[Tensor, Tensor]:
    """The rows (R, W), and causal attention on their norm (R, heads * D). ``linears``: queries, keys and values."""
    weights, biases, a, b, scaling = _parts(rows, linears)
    segment_arguments = segments.cu_seqlens, attention.head_dim, segments.max_seqlen, segments.backend
    norm_arguments = norm.weight, norm.variance_epsilon
    return AdaptedNormAttention.apply(
        rows,
        *norm_arguments,
        cos_sin,
        *segment_arguments,
        attention.scaling,
        scaling,
        *weights,
        *biases,
        *a,
        *b,
        *segments.shared,
    )


def _parts(rows: Tensor, linears: Sequence[nn.Module]) -> tuple[Any, Any, Any, Any, float]:
    """The weights, biases, As and Bs of ``linears``, and their one scaling."""
    adapters = adapters_of(rows, *linears)
    assert adapters is not None, "the caller checks adapters_of first"
    weights, biases, a, b, scalings = zip(*adapters, strict=True)
    return weights, biases, a, b, scalings[0]
