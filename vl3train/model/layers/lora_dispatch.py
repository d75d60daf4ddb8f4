"""Which linear layers have an adapter that compiled layers can take into their products, and their calls.

Whatever is not served here is called as peft's module, as it stands. R rows, W values a row, r the adapters' rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vl3train.model.attention.backends import Segments
from vl3train.model.kernels.gemm_ops import linear_add
from vl3train.model.layers.lora_halves import AdaptedNormAttention, AdaptedSwigluMlp

RANKS_OF = 8
"""Ranks served are multiples of this: rows of the kernels' operands begin at 16 bytes."""


class Adapter(NamedTuple):
    """One linear layer with its adapter."""

    weight: Tensor  # (out, in), frozen
    bias: Tensor | None  # (out,), frozen
    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    scaling: float


def adapter_of(module: Any) -> Adapter | None:
    """The adapter of peft's lora.Linear; None where it is anything but one plain adapter that is switched on."""
    name = "default"
    if not hasattr(module, "lora_A") or type(module.base_layer) is not nn.Linear:
        return None
    if module.merged or module.disable_adapters or list(module.active_adapters) != [name]:
        return None
    if len(module.lora_variant) or type(module.lora_dropout[name]) is not nn.Identity:
        return None
    base, a, b = module.base_layer, module.lora_A[name], module.lora_B[name]
    frozen = not base.weight.requires_grad and (base.bias is None or not base.bias.requires_grad)
    if not frozen or b.bias is not None or len(a.weight) % RANKS_OF:
        return None
    if not a.weight.dtype == b.weight.dtype == base.weight.dtype:
        return None  # peft computes such an adapter in its own format
    return Adapter(base.weight, base.bias, a.weight, b.weight, module.scaling[name])


def adapters_of(rows: Tensor, *modules: nn.Module) -> list[Adapter] | None:
    """Those of ``modules``, where every one has one of the same scaling, and ``rows`` have a backward pass."""
    found = [adapter_of(module) for module in modules]
    adapters = [adapter for adapter in found if adapter is not None]
    if not (torch.compiler.is_compiling() and rows.requires_grad and len(adapters) == len(found)):
        return None
    return adapters if all(adapter.scaling == adapters[0].scaling for adapter in adapters) else None


def adapted_add(rows: Tensor, linear: nn.Module, added: Tensor) -> Tensor:
    """F.linear with its adapter, plus ``added`` (R, out). Differentiable in all but the frozen weight."""
    weight, bias, a, b, scaling = _parts(rows, [linear])
    inner = rows @ a[0].t() * scaling
    return linear_add(rows, weight[0], bias[0], torch.addmm(added, inner, b[0].t()))


def adapted_mlp(rows: Tensor, norm: Any, linears: Sequence[nn.Module], level: str) -> Tensor:
    """Norm, MLP and residual; ``linears`` are gate, up and down."""
    weights, _, a, b, scaling = _parts(rows, linears)
    return AdaptedSwigluMlp.apply(rows, norm.weight, norm.variance_epsilon, level, scaling, *weights, *a, *b)


def adapted_attention(
    rows: Tensor, norm: Any, linears: Sequence[nn.Module], attention: Any, table: Tensor, segments: Segments
) -> tuple[Tensor, Tensor]:
    """The rows, and norm and causal attention of them; ``linears`` are those of queries, keys and values."""
    weights, biases, a, b, scaling = _parts(rows, linears)
    of_segments = segments.cu_seqlens, attention.head_dim, segments.max_seqlen, segments.backend
    of_norm = norm.weight, norm.variance_epsilon
    return AdaptedNormAttention.apply(
        rows, *of_norm, table, *of_segments, attention.scaling, scaling, *weights, *biases, *a, *b
    )


def _parts(rows: Tensor, linears: Sequence[nn.Module]) -> tuple[Any, Any, Any, Any, float]:
    """Weights, biases, A and B of each, and the scaling of all."""
    adapters = adapters_of(rows, *linears)
    assert adapters is not None, "the layer has asked before"
    weights, biases, a, b, scalings = zip(*adapters, strict=True)
    return weights, biases, a, b, scalings[0]
