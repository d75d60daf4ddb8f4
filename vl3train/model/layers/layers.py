"""One layer of each tower over packed rows: transformers' modules, called in transformers' order.

transformers' own layers cannot be compiled over packs (the encoder's splits its row on the host), keep either
every activation or none, and turn the rows of heads around for attention. Same modules, same arithmetic:
tests/model/test_packed_forward.py holds loss and gradients against the stock forward.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import GELUTanh, SiLUActivation
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb
from transformers.models.video_llama_3.modeling_video_llama_3 import apply_rotary_pos_emb_vision

from vl3train.config.choices import Recompute
from vl3train.model import compiling
from vl3train.model.activations.last_layer import rows_at
from vl3train.model.activations.offload import HostRows
from vl3train.model.activations.selective import KEEP_GEMMS, KEEP_HIDDEN_GEMMS
from vl3train.model.attention.backends import TORCH_VERSION, Segments, attend
from vl3train.model.attention.qkv_op import SERVED
from vl3train.model.kernels.gemm_ops import linear_add
from vl3train.model.kernels.ops import rope_cos_sin
from vl3train.model.layers.attention_half import NormAttention, NormLinears
from vl3train.model.layers.lora_dispatch import adapted_add, adapted_attention, adapted_mlp, adapters_of
from vl3train.model.layers.mlp_half import GeluMlp, SwigluMlp

Layer = Callable[..., Tensor]
"""(layer, hidden rows, cos, sin, rope_cos_sin of both where layers are compiled, segments, positions of the rows that
go on past attention or None for all, the level as a word, of which mlp and nothing mean something to a layer, whether
the passes of model/kernels/ops.py may serve, and quack's products with them) -> hidden rows."""

FUNCTIONS_ARE_REPEATED = TORCH_VERSION >= (2, 13)
"""torch 2.11's compiler keeps what an autograd.Function computes although the layer asks to compute it again; 2.14 does
as it is asked. There layers that compute everything again take the plain modules."""


def encoder_layer(
    layer: Any,
    hidden_PC: Tensor,
    cos_PD: Tensor,
    sin_PD: Tensor,
    table_PD: Tensor | None,
    segments: Segments,
    positions: Tensor | None = None,
    level: str = "elementwise",
    fused: bool = False,
    quack: bool = False,
) -> Tensor:
    """VideoLlama3VisionEncoderLayer: attention within each frame, then the MLP."""
    attention, mlp = layer.self_attn, layer.mlp
    hidden_PC, out_PC = _attention(
        layer.layer_norm1,
        attention,
        hidden_PC,
        (cos_PD, sin_PD, table_PD),
        segments,
        apply_rotary_pos_emb_vision,
        fused,
        quack,
        causal=False,
    )
    hidden_PC, out_PC = rows_at(positions, hidden_PC), rows_at(positions, out_PC)
    project = attention.out_proj
    plain = _plain(hidden_PC, layer.layer_norm2, project, mlp.fc1, mlp.fc2)
    if not (fused and plain and type(mlp.activation_fn) is GELUTanh):
        hidden_PC = hidden_PC + project(out_PC)
        return hidden_PC + _run_mlp(mlp, layer.layer_norm2(hidden_PC), level)
    handed_over = project.bias.detach()
    if quack:
        hidden_PC = linear_add(out_PC, project.weight, handed_over, hidden_PC)
    else:
        hidden_PC = hidden_PC + F.linear(out_PC, project.weight, handed_over)
    norm, fc1, fc2 = layer.layer_norm2, mlp.fc1, mlp.fc2
    weights = fc1.weight, fc1.bias, fc2.weight, fc2.bias
    of_norm = norm.weight, norm.bias, norm.eps
    return GeluMlp.apply(hidden_PC, project.bias, *of_norm, level, quack, *weights)


def decoder_layer(
    layer: Any,
    hidden_TH: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    table_TD: Tensor | None,
    segments: Segments,
    positions: Tensor | None = None,
    level: str = "elementwise",
    fused: bool = False,
    quack: bool = False,
) -> Tensor:
    """Qwen2DecoderLayer: causal attention within each sample, then the MLP."""
    attention, mlp = layer.self_attn, layer.mlp
    hidden_TH, out_TH = _attention(
        layer.input_layernorm,
        attention,
        hidden_TH,
        (cos_TD, sin_TD, table_TD),
        segments,
        apply_rotary_pos_emb,
        fused,
        quack,
        causal=True,
    )
    hidden_TH, out_TH = rows_at(positions, hidden_TH), rows_at(positions, out_TH)
    norm = layer.post_attention_layernorm
    with_adapters = fused and quack and type(norm) is Qwen2RMSNorm
    if fused and quack and _plain(hidden_TH, attention.o_proj):
        hidden_TH = linear_add(out_TH, attention.o_proj.weight, None, hidden_TH)
    elif with_adapters and adapters_of(hidden_TH, attention.o_proj):
        hidden_TH = adapted_add(out_TH, attention.o_proj, hidden_TH)
    else:
        hidden_TH = hidden_TH + attention.o_proj(out_TH)
    linears, swiglu = (mlp.gate_proj, mlp.up_proj, mlp.down_proj), type(mlp.act_fn) is SiLUActivation
    if with_adapters and swiglu and adapters_of(hidden_TH, *linears):
        return adapted_mlp(hidden_TH, norm, linears, level)
    if not (fused and swiglu and _plain(hidden_TH, norm, *linears)):
        return hidden_TH + _run_mlp(mlp, norm(hidden_TH), level)
    weights = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    sums = [weight.grad_sum for weight in (weights[0], weights[2]) if quack and hasattr(weight, "grad_sum")]
    of_norm = norm.weight, norm.variance_epsilon
    return SwigluMlp.apply(hidden_TH, *of_norm, level, quack, *weights, *sums)


def _attention(
    norm: Any,
    attention: Any,
    rows: Tensor,
    rope: tuple[Tensor, Tensor, Tensor | None],
    segments: Segments,
    rotate: Callable[..., tuple[Tensor, Tensor]],
    fused: bool,
    quack: bool,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """The rows for the residual, and what attention makes of them, the heads side by side."""
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    scale = attention.scaling
    plain = fused and _plain(rows, norm, *linears)
    centred = type(norm) is nn.LayerNorm
    of_norm = (norm.weight, norm.bias, norm.eps) if centred else (norm.weight, None, norm.variance_epsilon)
    parameters = *(linear.weight for linear in linears), *(linear.bias for linear in linears)
    *cos_sin, table = rope
    if plain and table is not None and segments.backend in SERVED:
        of_attention = (
            segments.cu_seqlens,
            attention.head_dim,
            segments.max_seqlen,
            segments.backend,
            causal,
            scale,
            quack,
        )
        return NormAttention.apply(rows, *of_norm, table, *of_attention, *parameters)
    served = fused and quack and causal and segments.backend in SERVED
    if served and table is not None and type(norm) is Qwen2RMSNorm and adapters_of(rows, *linears):
        return adapted_attention(rows, norm, linears, attention, table, segments)
    if plain:
        rows, *qkv = NormLinears.apply(rows, *of_norm, *parameters)
    else:
        normed = norm(rows)
        qkv = [linear(normed) for linear in linears]
    q, k, v = (x.unflatten(-1, (-1, attention.head_dim)) for x in qkv)
    q, k = rotate(q, k, *cos_sin)
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


def _run(
    body: Layer,
    layer: nn.Module,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    table: Tensor | None,
    cu_seqlens: Tensor,
    lengths: tuple[int, ...],
    max_seqlen: int,
    backend: str,
    positions: Tensor | None,
    recompute: str,
    quack: bool,
) -> Tensor:
    # Plain arguments, no record: torch.compile then sees max_seqlen as a number that may change.
    segments = Segments(cu_seqlens, lengths, max_seqlen, backend)
    inputs = (layer, hidden, cos, sin, table, segments, positions)
    fused = FUNCTIONS_ARE_REPEATED or recompute != "layer"
    if recompute == "layer":
        return checkpoint(body, *inputs, "elementwise", fused, quack, use_reentrant=False)
    if recompute == "nothing" or torch.compiler.is_compiling():
        # The compiler keeps results of products and attention, and of the elementwise rest at most what products of
        # quack give beside theirs.
        return body(*inputs, recompute, fused, quack)
    contexts = KEEP_GEMMS if recompute == "elementwise" else KEEP_HIDDEN_GEMMS
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
    gemm_backend: str,
    compiled: bool,
    positions: Tensor | None = None,
    before: Callable[[], None] | None = None,
    on_backward: Callable[[], None] | None = None,
) -> Tensor:
    """All layers of a tower, one after the other, each recomputing in the backward pass what its level says.

    As many layers run as there are ``levels``, the first ones: all but in a rehearsal (engine/memory/warmup.py).
    ``products`` is a name from model/kernels/check.py, for compiled layers. Where there are ``positions``, only the
    rows there come out of the last layer (model/activations/last_layer.py). ``before`` is called before each layer,
    ``on_backward`` in the backward pass after each, when what the layer kept is freed.
    """
    host, table = HostRows(), rope_cos_sin(*rope) if compiled else None
    for number, (layer, level) in enumerate(
        zip(itertools.islice(layers, len(levels)), levels, strict=True), start=1
    ):
        if before is not None:
            before()
        # Outside of what is compiled: the arithmetic is that of layer, and so is the graph.
        if on_backward is not None and hidden.requires_grad:
            hidden.register_hook(lambda _: on_backward())
        offload = level is Recompute.offload
        with host.keep_input(hidden) if offload else contextlib.nullcontext():
            hidden = runner(
                body,
                layer,
                hidden,
                *rope,
                table,
                segments.cu_seqlens,
                segments.lengths,
                segments.max_seqlen,
                segments.backend,
                positions if number == len(levels) else None,
                (Recompute.layer if offload else level).value,
                gemm_backend == "quack",
            )
    return hidden
