"""All layers of a tower, one after the other, each recomputing in the backward pass what its level says."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vl3train.config.choices import Recompute
from vl3train.model import compiling
from vl3train.model.activations.offload import HostRows
from vl3train.model.activations.selective import KEEP_GEMMS, KEEP_HIDDEN_GEMMS
from vl3train.model.attention.backends import TORCH_VERSION, Segments
from vl3train.model.kernels.ops import rope_cos_sin
from vl3train.model.layers.layers import GradientSums, Layer, LayerMode, Rope

FUNCTIONS_ARE_REPEATED = TORCH_VERSION >= (2, 13)
"""torch 2.11's compiler keeps what an autograd.Function computes although the layer asks to recompute it; 2.14 does
recompute it. With torch 2.11, layers that recompute everything run the plain modules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCallbacks:
    """What run_layers calls around each layer; None: nothing."""

    before_layer: Callable[[], None] | None = None  # in the forward pass, before each layer
    after_layer_backward: Callable[[], None] | None = None  # after each, when what the layer kept is freed


NO_CALLBACKS = LayerCallbacks()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """The layers of the encoder or of the language model, and how they run: the same for every pack."""

    layers: nn.ModuleList
    body: Layer  # encoder_layer or decoder_layer
    run_layer: Callable[..., Tensor]  # from layer_runner
    compiled: bool  # as layer_runner took it
    gemm_backend: str  # a name from model/kernels/check.py; for compiled layers


def run_layers(
    tower: Tower,
    hidden: Tensor,
    cos_sin: tuple[Tensor, Tensor],
    segments: Segments,
    levels: Sequence[Recompute],
    *,
    positions: Tensor | None = None,
    sums: Sequence[GradientSums] = (),
    callbacks: LayerCallbacks = NO_CALLBACKS,
) -> Tensor:
    """All layers of a tower, one after the other: (R, W) rows -> (R, W) rows.

    ``cos_sin`` (R, D) each. ``levels`` has one entry a layer: what this recomputes in the backward pass. As many layers
    run as there are levels, the first ones: all of them, except in a kernel warm-up (engine/memory/warmup.py). Where
    there are ``positions``, the last layer gives only the rows there (model/activations/last_layer.py). ``sums`` has
    the gradient sums of each layer, or none at all.
    """
    host = HostRows()
    rope = Rope(*cos_sin, rope_cos_sin(*cos_sin) if tower.compiled else None)
    layers = itertools.islice(tower.layers, len(levels))
    for number, (layer, level) in enumerate(zip(layers, levels, strict=True)):
        if callbacks.before_layer is not None:
            callbacks.before_layer()
        # Outside of what is compiled: the arithmetic is that of level layer, and so is the graph.
        if (after := callbacks.after_layer_backward) is not None and hidden.requires_grad:
            hidden.register_hook(lambda _, after=after: after())
        offload = level is Recompute.offload
        with host.keep_input(hidden) if offload else contextlib.nullcontext():
            hidden = tower.run_layer(
                tower.body,
                layer,
                hidden,
                rope,
                segments.cu_seqlens,
                segments.lengths,
                segments.max_seqlen,
                segments.backend,
                segments.shared,
                sums[number] if sums else (),
                positions if number == len(levels) - 1 else None,
                (Recompute.layer if offload else level).value,
                tower.gemm_backend == "quack",
            )
    return hidden


def _run(
    body: Layer,
    layer: nn.Module,
    hidden: Tensor,
    rope: Rope,
    cu_seqlens: Tensor,
    lengths: tuple[int, ...],
    max_seqlen: int,
    backend: str,
    shared: tuple[Tensor, ...],
    sums: GradientSums,
    positions: Tensor | None,
    recompute: str,
    quack: bool,
) -> Tensor:
    # This is what torch.compile compiles. Tuples of tensors may come as they are. The rest are plain arguments: of a
    # record's max_seqlen the compiler would make a constant, and compile anew for each value.
    segments = Segments(cu_seqlens, lengths, max_seqlen, backend, shared)
    inputs = (layer, hidden, rope, segments, sums, positions)
    fused = FUNCTIONS_ARE_REPEATED or recompute != "layer"
    if recompute == "layer":
        return checkpoint(body, *inputs, LayerMode("elementwise", fused, quack), use_reentrant=False)
    if recompute == "nothing" or torch.compiler.is_compiling():
        # The compiler keeps the results of matrix products and attention. Of the elementwise work it keeps at most what
        # quack's products give beside their result.
        return body(*inputs, LayerMode(recompute, fused, quack))
    contexts = KEEP_GEMMS if recompute == "elementwise" else KEEP_HIDDEN_GEMMS
    return checkpoint(body, *inputs, LayerMode(), use_reentrant=False, context_fn=contexts)


def layer_runner(*, compiled: bool) -> Callable[..., Tensor]:
    """What ``run_layers`` calls for each layer; ``compiled`` fuses its elementwise work into few kernels.

    All layers of a tower share one compilation, whatever the lengths of the pack.
    """
    return compiling.compiled(_run, enabled=compiled)
