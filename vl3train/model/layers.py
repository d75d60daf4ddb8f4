"""One layer of each tower over packed rows: transformers' modules, called in transformers' order.

transformers' own layers cannot be compiled over packs (the encoder's splits its row on the host), keep either
every activation or none, and turn the rows of heads around for attention. Same modules, same arithmetic:
tests/model/test_packed_forward.py holds loss and gradients against the stock forward.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb
from transformers.models.video_llama_3.modeling_video_llama_3 import apply_rotary_pos_emb_vision

from vl3train.config.choices import Recompute
from vl3train.model import compiling
from vl3train.model.attention import Segments, attend
from vl3train.model.offload import HostRows

Layer = Callable[..., Tensor]
"""(layer, hidden rows, cos, sin, segments, whether the MLP is computed again) -> hidden rows."""


def encoder_layer(
    layer: Any, hidden_PC: Tensor, cos_PD: Tensor, sin_PD: Tensor, segments: Segments, mlp_again: bool = False
) -> Tensor:
    """VideoLlama3VisionEncoderLayer: attention within each frame, then the MLP."""
    attention = layer.self_attn
    heads = (attention.num_heads, attention.head_dim)
    normed_PC = layer.layer_norm1(hidden_PC)
    q, k, v = (
        linear(normed_PC).unflatten(-1, heads)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = apply_rotary_pos_emb_vision(q, k, cos_PD, sin_PD)
    out = attend(q, k, v, segments, causal=False, scale=attention.scaling)
    hidden_PC = hidden_PC + attention.out_proj(out.flatten(-2))
    return hidden_PC + _mlp(layer.mlp, layer.layer_norm2(hidden_PC), mlp_again)


def decoder_layer(
    layer: Any, hidden_TH: Tensor, cos_TD: Tensor, sin_TD: Tensor, segments: Segments, mlp_again: bool = False
) -> Tensor:
    """Qwen2DecoderLayer: causal attention within each sample, then the MLP."""
    attention = layer.self_attn
    normed_TH = layer.input_layernorm(hidden_TH)
    q, k, v = (
        linear(normed_TH).unflatten(-1, (-1, attention.head_dim))
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, cos_TD, sin_TD)
    out = attend(q, k, v, segments, causal=True, scale=attention.scaling)
    hidden_TH = hidden_TH + attention.o_proj(out.flatten(-2))
    return hidden_TH + _mlp(layer.mlp, layer.post_attention_layernorm(hidden_TH), mlp_again)


def _mlp(mlp: Any, normed: Tensor, again: bool) -> Tensor:
    body = mlp
    if torch.compiler.is_compiling() and type(getattr(mlp, "fc1", None)) is nn.Linear:
        body = functools.partial(_encoder_mlp, mlp)
    return checkpoint(body, normed, use_reentrant=False) if again else body(normed)


def _encoder_mlp(mlp: Any, normed_PC: Tensor) -> Tensor:
    """VideoLlama3VisionMLP, with fc1's weight gradient as the product of the transposed shape."""
    wide_PI = WideLinear.apply(normed_PC, mlp.fc1.weight, mlp.fc1.bias)
    return mlp.fc2(mlp.activation_fn(wide_PI))


class WideLinear(torch.autograd.Function):
    """``F.linear`` that widens its rows: the gradient of its weight is computed as (in, out) and turned around.

    cuBLAS has a better kernel for that shape: 0.64 ms against 0.86 for 49 152 rows from 1152 to 4304 wide (H100).
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(P, in), (out, in), (out,) -> (P, out)."""
        ctx.save_for_backward(rows, weight)
        return F.linear(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of rows, weight and bias."""
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            grad @ weight if needs_rows else None,
            (rows.t() @ grad).t() if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


def _run(
    body: Layer,
    layer: nn.Module,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    lengths: tuple[int, ...],
    max_seqlen: int,
    backend: str,
    recompute: str,
) -> Tensor:
    # Plain arguments, no record: torch.compile then sees max_seqlen as a number that may change.
    segments = Segments(cu_seqlens, lengths, max_seqlen, backend)
    inputs = (layer, hidden, cos, sin, segments)
    if recompute == "layer":
        return checkpoint(body, *inputs, use_reentrant=False)
    if recompute == "nothing" or torch.compiler.is_compiling():
        # The compiler keeps results of products and attention and computes the elementwise rest again.
        return body(*inputs, recompute == "mlp")
    contexts = _KEEP_PRODUCTS if recompute == "elementwise" else _KEEP_NARROW_PRODUCTS
    return checkpoint(body, *inputs, use_reentrant=False, context_fn=contexts)


def layer_runner(*, compiled: bool) -> Callable[..., Tensor]:
    """What ``run_layers`` calls for each layer; ``compiled`` fuses its elementwise work into few kernels.

    All layers of a tower share one compilation, whatever the lengths of the pack.
    """
    return compiling.compiled(_run, enabled=compiled)


_ARITHMETIC = {Recompute.offload: Recompute.layer, Recompute.wide_offload: Recompute.elementwise}
"""Levels that differ from another only in where rows wait."""


def run_layers(
    runner: Callable[..., Tensor],
    body: Layer,
    layers: nn.ModuleList,
    hidden: Tensor,
    rope: tuple[Tensor, Tensor],
    segments: Segments,
    levels: Sequence[Recompute],
) -> Tensor:
    """All layers of a tower, one after the other, each recomputing in the backward pass what its level says."""
    host = HostRows()
    for layer, level in zip(layers, levels, strict=True):
        # Outside of what is compiled, so that levels with the same arithmetic share one graph.
        where: AbstractContextManager[object] = contextlib.nullcontext()
        if level is Recompute.offload:
            where = host.keep_input(hidden)
        elif level is Recompute.wide_offload:
            where = host.keep_wide(hidden, layer)
        with where:
            hidden = runner(
                body,
                layer,
                hidden,
                *rope,
                segments.cu_seqlens,
                segments.lengths,
                segments.max_seqlen,
                segments.backend,
                _ARITHMETIC.get(level, level).value,
            )
    return hidden


_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default: 1, _aten.addmm.default: 2}
"""Matrix products, with the position of their weight (in, out)."""
_ATTENTION = {
    "vl3train::flash_attn_4",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_attention_math",
}


def _keep_products(_: Any, op: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    if op in _PRODUCTS or op._schema.name in _ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _keep_narrow_products(_: Any, op: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    # The products that widen the row are the MLP's: 6 of 7 parts of what a layer would keep, a third of its work.
    if op in _PRODUCTS:
        width_in, width_out = args[_PRODUCTS[op]].shape
        wide = width_out > width_in
        return CheckpointPolicy.PREFER_RECOMPUTE if wide else CheckpointPolicy.MUST_SAVE
    return _keep_products(_, op)


_KEEP_PRODUCTS = functools.partial(create_selective_checkpoint_contexts, _keep_products)
_KEEP_NARROW_PRODUCTS = functools.partial(create_selective_checkpoint_contexts, _keep_narrow_products)
