"""One layer of each tower over packed rows: transformers' modules, called in transformers' order.

transformers' own layers cannot be compiled over packs (the encoder's splits its row on the host), keep either every
activation or none, and transpose the heads for attention. Same modules, same arithmetic:
tests/model/test_packed_forward.py holds loss and gradients against the stock forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import GELUTanh, SiLUActivation
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb
from transformers.models.video_llama_3.modeling_video_llama_3 import apply_rotary_pos_emb_vision

from vl3train.model.activations.last_layer import rows_at
from vl3train.model.attention.backends import Segments, attend
from vl3train.model.attention.qkv_op import SERVED
from vl3train.model.kernels.gemm_ops import linear_add
from vl3train.model.layers.attention_half import NormAttention, NormLinears
from vl3train.model.layers.lora_dispatch import adapted_add, adapted_attention, adapted_mlp, adapters_of
from vl3train.model.layers.mlp_half import GeluMlp, SwigluMlp

GradientSums = tuple[Tensor, ...]
"""float32 sums to which one layer of the language model adds the gradients of its MLP's weights: that of gate and up,
one below the other (2 I, H), and that of down (H, I). Empty: the weights get a ``grad`` as usual."""


class Rope(NamedTuple):
    """The rotary embedding of R rows, for heads of D values."""

    cos: Tensor  # (R, D)
    sin: Tensor  # (R, D)
    cos_sin: (
        Tensor | None
    )  # both, as fused ops take them (model/kernels/ops.py); None where layers are not compiled


class LayerMode(NamedTuple):
    """How one layer computes. The defaults are those of a layer that is not compiled."""

    level: str = "elementwise"  # a Recompute as a word; inside a layer only mlp and nothing make a difference
    fused: bool = False  # whether the fused passes of model/kernels/ops.py may run
    quack: bool = False  # whether quack may make the matrix products of fused passes


Layer = Callable[[Any, Tensor, Rope, Segments, GradientSums, Tensor | None, LayerMode], Tensor]
"""(layer, hidden rows, rope, segments, gradient sums, positions of the rows that go on past attention or None for all,
mode) -> hidden rows."""


def encoder_layer(
    layer: Any,
    hidden_PC: Tensor,
    rope: Rope,
    segments: Segments,
    sums: GradientSums,
    positions: Tensor | None,
    mode: LayerMode,
) -> Tensor:
    """VideoLlama3VisionEncoderLayer: attention within each frame, then the MLP. It takes no gradient ``sums``."""
    del sums  # always empty: one signature for the layers of both towers
    attention, mlp = layer.self_attn, layer.mlp
    hidden_PC, out_PC = _attention(
        layer.layer_norm1, attention, hidden_PC, rope, segments, mode, causal=False
    )
    hidden_PC, out_PC = rows_at(positions, hidden_PC), rows_at(positions, out_PC)
    project = attention.out_proj
    plain = _plain(hidden_PC, layer.layer_norm2, project, mlp.fc1, mlp.fc2)
    if not (mode.fused and plain and type(mlp.activation_fn) is GELUTanh):
        hidden_PC = hidden_PC + project(out_PC)
        return hidden_PC + _run_mlp(mlp, layer.layer_norm2(hidden_PC), mode.level)
    handed_over = project.bias.detach()
    if mode.quack:
        hidden_PC = linear_add(out_PC, project.weight, handed_over, hidden_PC)
    else:
        hidden_PC = hidden_PC + F.linear(out_PC, project.weight, handed_over)
    norm, fc1, fc2 = layer.layer_norm2, mlp.fc1, mlp.fc2
    weights = fc1.weight, fc1.bias, fc2.weight, fc2.bias
    of_norm = norm.weight, norm.bias, norm.eps
    return GeluMlp.apply(hidden_PC, project.bias, *of_norm, mode.level, mode.quack, *weights)


def decoder_layer(
    layer: Any,
    hidden_TH: Tensor,
    rope: Rope,
    segments: Segments,
    sums: GradientSums,
    positions: Tensor | None,
    mode: LayerMode,
) -> Tensor:
    """Qwen2DecoderLayer: causal attention within each sample, then the MLP."""
    attention, mlp = layer.self_attn, layer.mlp
    hidden_TH, out_TH = _attention(
        layer.input_layernorm, attention, hidden_TH, rope, segments, mode, causal=True
    )
    hidden_TH, out_TH = rows_at(positions, hidden_TH), rows_at(positions, out_TH)
    norm = layer.post_attention_layernorm
    with_quack = mode.fused and mode.quack
    with_adapters = with_quack and type(norm) is Qwen2RMSNorm
    if with_quack and _plain(hidden_TH, attention.o_proj):
        hidden_TH = linear_add(out_TH, attention.o_proj.weight, None, hidden_TH)
    elif with_adapters and adapters_of(hidden_TH, attention.o_proj):
        hidden_TH = adapted_add(out_TH, attention.o_proj, hidden_TH)
    else:
        hidden_TH = hidden_TH + attention.o_proj(out_TH)
    linears, swiglu = (mlp.gate_proj, mlp.up_proj, mlp.down_proj), type(mlp.act_fn) is SiLUActivation
    if with_adapters and swiglu and adapters_of(hidden_TH, *linears):
        return adapted_mlp(hidden_TH, norm, linears, mode.level)
    if not (mode.fused and swiglu and _plain(hidden_TH, norm, *linears)):
        return hidden_TH + _run_mlp(mlp, norm(hidden_TH), mode.level)
    weights = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    of_norm = norm.weight, norm.variance_epsilon
    return SwigluMlp.apply(hidden_TH, *of_norm, mode.level, mode.quack, *weights, *sums)


def _attention(
    norm: Any,
    attention: Any,
    rows: Tensor,
    rope: Rope,
    segments: Segments,
    mode: LayerMode,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """The rows for the residual, and what attention makes of them, the heads side by side.

    ``causal`` is the language model's attention; the encoder's is not, and its rotary function is another.
    """
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    scale = attention.scaling
    plain = mode.fused and _plain(rows, norm, *linears)
    centred = type(norm) is nn.LayerNorm
    of_norm = (norm.weight, norm.bias, norm.eps) if centred else (norm.weight, None, norm.variance_epsilon)
    parameters: tuple[Any, ...] = ()
    if plain:  # else a linear layer may have another weight, as one in 4 bits
        parameters = *(linear.weight for linear in linears), *(linear.bias for linear in linears)
    if plain and rope.cos_sin is not None and segments.backend in SERVED:
        of_attention = (
            segments.cu_seqlens,
            attention.head_dim,
            segments.max_seqlen,
            segments.backend,
            causal,
            scale,
            mode.quack,
        )
        return NormAttention.apply(rows, *of_norm, rope.cos_sin, *of_attention, *parameters, *segments.shared)
    served = mode.fused and mode.quack and causal and segments.backend in SERVED
    if served and rope.cos_sin is not None and type(norm) is Qwen2RMSNorm and adapters_of(rows, *linears):
        return adapted_attention(rows, norm, linears, attention, rope.cos_sin, segments)
    if plain:
        rows, *qkv = NormLinears.apply(rows, *of_norm, *parameters)
    else:
        normed = norm(rows)
        qkv = [linear(normed) for linear in linears]
    q, k, v = (x.unflatten(-1, (-1, attention.head_dim)) for x in qkv)
    rotate = apply_rotary_pos_emb if causal else apply_rotary_pos_emb_vision
    q, k = rotate(q, k, rope.cos, rope.sin)
    return rows, attend(q, k, v, segments, causal=causal, scale=scale).flatten(-2)


def _run_mlp(body: Callable[[Tensor], Tensor], rows: Tensor, level: str) -> Tensor:
    return checkpoint(body, rows, use_reentrant=False) if level == "mlp" else body(rows)


def _plain(rows: Tensor, *modules: nn.Module) -> bool:
    """Whether these are compiled, have a backward pass, and are no more than their weights: adapters are not."""
    plain = nn.Linear, nn.LayerNorm, Qwen2RMSNorm
    # Of a Function without a gradient, torch's tracer guesses by the number of arguments whether it takes a context.
    return (
        torch.compiler.is_compiling()
        and rows.requires_grad
        and all(type(module) in plain for module in modules)
    )
