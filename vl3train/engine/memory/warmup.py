"""Packs of many sizes run once before the first step, so that no step stops to load a kernel.

CUDA loads a kernel when it is called for the first time, and for that the whole GPU has to have finished, copies
too: 107 ms of a step of the 2B, in which nothing ran while AdamW's means came in. cuBLAS chooses its kernels by the
number of rows, which no two packs share: after 25 sizes each new one still brought 0.8 kernels that had not been
loaded, with CUDA_MODULE_LOADING=EAGER too (benchmarks/log.md, round eight). Of many GPUs all wait for the one that
loads.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

import torch

from vl3train.config.choices import Memory, Recompute
from vl3train.config.schema import TrainConfig
from vl3train.contracts.records import Batch, Cursor
from vl3train.data.extremes import blank_batch, packs_of_many_sizes
from vl3train.data.loader import OpenData
from vl3train.engine.monitor.console import Console
from vl3train.engine.zero.engine import Zero
from vl3train.model.activations.budget import level_scale
from vl3train.model.activations.work import RecomputePlan
from vl3train.model.packed_forward import PackedModel

SIZES = 192
"""Of packs of 16 384 tokens; to make the batch of one takes the host some 35 ms."""


def num_sizes(max_tokens: int) -> int:
    """How many packs of that many tokens are warmed_up: fewer of longer ones, whose steps are longer too.

    >>> num_sizes(4096), num_sizes(16384), num_sizes(131072)
    (192, 192, 25)
    """
    return min(SIZES, SIZES * 16384 // max_tokens + 1)


def warm_up_run(
    cfg: TrainConfig,
    engine: Zero,
    packed: PackedModel,
    data: OpenData,
    first: Cursor,
    last_step: int,
    console: Console,
) -> None:
    """Rehearse packs of the sizes that the run will meet. All ranks call it.

    Not for a CPU, which loads no kernels, nor for ZeRO-3, whose prefetching learns the order of modules from its first
    forward pass.
    """
    machine = cfg.machine
    packs = packs_of_many_sizes(data.plan, first, last_step, num_sizes(cfg.step.max_tokens))
    if machine.memory is Memory.auto:
        levels = plans_to_warm_up(packed)
    else:
        levels = [RecomputePlan((machine.recompute_vision,), (machine.recompute_language,) * 2)]

    def batches() -> Iterator[Batch]:
        for number, pack in enumerate(packs):
            console.count(
                "loading kernels, compiling those that are new", number, len(packs), "sizes of pack"
            )
            yield blank_batch(data, pack, machine.loss_chunk_tokens)

    started = time.perf_counter()
    warm_up(engine, packed, batches(), levels)
    console.message(
        f"kernels: those for packs of {packs[-1].num_patches:,} to {packs[0].num_patches:,} patches are loaded, "
        f"{time.perf_counter() - started:.0f} s"
    )


def plans_to_warm_up(packed: PackedModel) -> list[RecomputePlan]:
    """One layer of the encoder and two of the language model, whose last is unlike the others, at each level that
    machine.memory=auto chooses from; offload has the kernels of layer."""
    scale = ((Recompute.nothing,) if packed.keeps_more_at_nothing else ()) + level_scale(zero_stage=1)
    return [RecomputePlan((level,), (level,) * 2) for level in scale if level is not Recompute.offload]


def warm_up(
    engine: Zero, packed: PackedModel, batches: Iterable[Batch], levels: Sequence[RecomputePlan]
) -> None:
    """Forward and backward pass of each batch, its loss counted zero times, with as many layers as ``levels`` have.

    The layers of a tower are alike, but for the language model's last (model/activations/last_layer.py): one and the
    last are enough. Batches take ``levels`` in turn; large ones come first, since the compiler tunes its kernels for
    the sizes that it meets first. Weights, gradients and random numbers stay as they were.
    """
    choose_plan = packed.choose_plan
    device = engine.rank.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            for number, batch in enumerate(batches):
                now = levels[number % len(levels)]
                packed.choose_plan = lambda *_, now=now: now
                engine.backward(engine.forward(batch).loss_sum * 0)
        finally:
            packed.choose_plan = choose_plan
