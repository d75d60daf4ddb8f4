"""One layer of each tower over packed rows: transformers' modules, called in transformers' order.

transformers' own layers cannot be compiled over packs (the encoder's splits its row on the host), keep either
every activation or none, and turn the rows of heads around for attention. Same modules, same arithmetic:
tests/model/test_packed_forward.py holds loss and gradients against the stock forward.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.activations import GELUTanh
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb
from transformers.models.video_llama_3.modeling_video_llama_3 import apply_rotary_pos_emb_vision

from vl3train.config.choices import Recompute
from vl3train.model import compiling
from vl3train.model.attention import TORCH_VERSION, Segments, attend
from vl3train.model.fused import GeluLinear, NormLinears
from vl3train.model.offload import HostRows

Layer = Callable[..., Tensor]
"""(layer, hidden rows, cos, sin, segments, whether the MLP is computed again, whether the passes of model/fused.py may
serve) -> hidden rows."""

FUSED_ONES_ARE_REPEATED = TORCH_VERSION >= (2, 13)
"""torch 2.11's compiler keeps what an autograd.Function computes although the layer asks to compute it again, all 48 KB
of a token's MLP; 2.14 does as it is asked. There layers that compute again take the plain modules."""


def encoder_layer(
    layer: Any,
    hidden_PC: Tensor,
    cos_PD: Tensor,
    sin_PD: Tensor,
    segments: Segments,
    mlp_again: bool = False,
    fused: bool = False,
) -> Tensor:
    """VideoLlama3VisionEncoderLayer: attention within each frame, then the MLP."""
    attention = layer.self_attn
    heads = (attention.num_heads, attention.head_dim)
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    hidden_PC, *qkv = _norm_linears(layer.layer_norm1, linears, hidden_PC, fused)
    q, k, v = (x.unflatten(-1, heads) for x in qkv)
    q, k = apply_rotary_pos_emb_vision(q, k, cos_PD, sin_PD)
    out_PC = attend(q, k, v, segments, causal=False, scale=attention.scaling).flatten(-2)
    project, mlp = attention.out_proj, layer.mlp
    plain = (
        _plain(hidden_PC, layer.layer_norm2, project, mlp.fc1, mlp.fc2)
        and type(mlp.activation_fn) is GELUTanh
    )
    if not (fused and plain):
        hidden_PC = hidden_PC + project(out_PC)
        return hidden_PC + _maybe_again(mlp, layer.layer_norm2(hidden_PC), mlp_again)
    hidden_PC = hidden_PC + F.linear(out_PC, project.weight, project.bias.detach())
    return _maybe_again(functools.partial(_encoder_mlp, layer, mlp_again), hidden_PC, mlp_again)


def _encoder_mlp(layer: Any, again: bool, hidden_PC: Tensor) -> Tensor:
    """LayerNorm, VideoLlama3VisionMLP and the residual; the biases whose gradient another pass sums go there."""
    fc1, fc2, norm = layer.mlp.fc1, layer.mlp.fc2, layer.layer_norm2
    # cuBLAS has a better kernel for the turned gradient of fc1: 0.64 ms against 0.86 for 49 152 rows from 1152 to
    # 4304 wide (H100).
    hidden_PC, wide_PI = NormLinears.apply(
        hidden_PC,
        layer.self_attn.out_proj.bias,
        fc2.bias,
        norm.weight,
        norm.bias,
        norm.eps,
        True,
        again,
        True,
        fc1.weight,
        fc1.bias.detach(),
    )
    return hidden_PC + GeluLinear.apply(wide_PI, fc1.bias, fc2.weight, fc2.bias.detach())


def decoder_layer(
    layer: Any,
    hidden_TH: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    segments: Segments,
    mlp_again: bool = False,
    fused: bool = False,
) -> Tensor:
    """Qwen2DecoderLayer: causal attention within each sample, then the MLP."""
    attention = layer.self_attn
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    hidden_TH, *qkv = _norm_linears(layer.input_layernorm, linears, hidden_TH, fused)
    q, k, v = (x.unflatten(-1, (-1, attention.head_dim)) for x in qkv)
    q, k = apply_rotary_pos_emb(q, k, cos_TD, sin_TD)
    out = attend(q, k, v, segments, causal=True, scale=attention.scaling)
    hidden_TH = hidden_TH + attention.o_proj(out.flatten(-2))
    if not (
        fused and _plain(hidden_TH, layer.post_attention_layernorm, layer.mlp.gate_proj, layer.mlp.up_proj)
    ):
        return hidden_TH + _maybe_again(layer.mlp, layer.post_attention_layernorm(hidden_TH), mlp_again)
    return _maybe_again(functools.partial(_decoder_mlp, layer, mlp_again), hidden_TH, mlp_again)


def _decoder_mlp(layer: Any, again: bool, hidden_TH: Tensor) -> Tensor:
    """RMSNorm, Qwen2MLP and the residual."""
    mlp = layer.mlp
    linears = (mlp.gate_proj, mlp.up_proj)
    hidden_TH, gate_TI, up_TI = _norm_linears(layer.post_attention_layernorm, linears, hidden_TH, True, again)
    return hidden_TH + mlp.down_proj(mlp.act_fn(gate_TI) * up_TI)


def _maybe_again(body: Callable[[Tensor], Tensor], rows: Tensor, again: bool) -> Tensor:
    return checkpoint(body, rows, use_reentrant=False) if again else body(rows)


def _norm_linears(
    norm: Any, linears: Sequence[Any], rows: Tensor, fused: bool, again: bool = False
) -> tuple[Tensor, ...]:
    """The rows for the residual, and what each of ``linears`` makes of the normed rows."""
    if not (fused and _plain(rows, norm, *linears)):
        normed = norm(rows)
        return rows, *(linear(normed) for linear in linears)
    centred = type(norm) is nn.LayerNorm
    eps = norm.eps if centred else norm.variance_epsilon
    bias = norm.bias if centred else None
    parameters = *(linear.weight for linear in linears), *(linear.bias for linear in linears)
    return NormLinears.apply(rows, None, None, norm.weight, bias, eps, centred, again, False, *parameters)


def _plain(rows: Tensor, *modules: nn.Module) -> bool:
    """Whether these are compiled, have a backward pass, and are no more than their weights: adapters are not."""
    plain = nn.Linear, nn.LayerNorm, Qwen2RMSNorm
    # Of a Function without a gradient, torch's tracer guesses by the number of arguments whether it takes a context.
    return (
        torch.compiler.is_compiling()
        and rows.requires_grad
        and all(type(module) in plain for module in modules)
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
    fused = FUSED_ONES_ARE_REPEATED or recompute in ("nothing", "elementwise")
    if recompute == "layer":
        return checkpoint(body, *inputs, False, fused, use_reentrant=False)
    if recompute == "nothing" or torch.compiler.is_compiling():
        # The compiler keeps results of products and attention and computes the elementwise rest again.
        return body(*inputs, recompute == "mlp", fused)
    contexts = _KEEP_PRODUCTS if recompute == "elementwise" else _KEEP_NARROW_PRODUCTS
    return checkpoint(body, *inputs, use_reentrant=False, context_fn=contexts)


def layer_runner(*, compiled: bool) -> Callable[..., Tensor]:
    """What ``run_layers`` calls for each layer; ``compiled`` fuses its elementwise work into few kernels.

    All layers of a tower share one compilation, whatever the lengths of the pack.
    """
    return compiling.compiled(_run, enabled=compiled)


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
        # Outside of what is compiled: the arithmetic is that of layer, and so is the graph.
        offload = level is Recompute.offload
        with host.keep_input(hidden) if offload else contextlib.nullcontext():
            hidden = runner(
                body,
                layer,
                hidden,
                *rope,
                segments.cu_seqlens,
                segments.lengths,
                segments.max_seqlen,
                segments.backend,
                (Recompute.layer if offload else level).value,
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
