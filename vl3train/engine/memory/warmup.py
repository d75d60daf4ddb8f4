"""Kernel warm-up: packs of many sizes run once before the first step, so that no step stops to load a kernel.

CUDA loads a kernel at its first call, and waits until the whole GPU has finished, copies too: 107 ms of a step of the
2B, in which nothing ran while optimizer state came in. cuBLAS chooses its kernels by the number of rows, which no two
packs share: after 25 sizes each new one still brought 0.8 kernels that had not been loaded, with
CUDA_MODULE_LOADING=EAGER too (benchmarks/log.md, round eight). All GPUs of a run wait for the one that loads.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from vl3train.config.choices import Memory, Recompute
from vl3train.config.schema import TrainConfig
from vl3train.contracts.records import Batch, Cursor
from vl3train.data.extremes import blank_batch, packs_of_many_sizes
from vl3train.data.loader import OpenData
from vl3train.engine.memory.known import NO_LEVELS, TowerLevels
from vl3train.engine.monitor.console import Console
from vl3train.engine.zero.engine import Zero
from vl3train.model.activations.budget import level_scale
from vl3train.model.activations.work import RecomputePlan, uniform_plan
from vl3train.model.packed_forward import PackedModel

SIZES = 192
"""Number of packs of 16 384 tokens. The host needs about 35 ms to build the batch of one."""

LAYERS_WARMED_UP = (1, 2)
"""Of the encoder and of the language model. The layers of a tower run the same kernels, but for the language model's
last (model/activations/last_layer.py): one of the others and the last are enough."""


def num_sizes(max_tokens: int) -> int:
    """How many packs of that many tokens warm up a run: fewer of longer ones, whose steps are longer too.

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
    levels: TowerLevels = NO_LEVELS,
) -> None:
    """Warm up the kernels for the pack sizes that the run will meet. All ranks call it.

    With machine.memory=auto at the ``levels`` that steps of an earlier run took; at all where there was none.

    Not for a CPU, which loads no kernels. Not for ZeRO-3, whose prefetching learns the order of modules from its first
    forward pass.
    """
    machine = cfg.machine
    packs = packs_of_many_sizes(data.plan, first, last_step, num_sizes(cfg.step.max_tokens))
    if machine.memory is Memory.auto:
        plans = plans_of_levels(levels) or plans_to_warm_up(packed)
    else:
        plans = [uniform_plan(machine.recompute_vision, machine.recompute_language, LAYERS_WARMED_UP)]

    def batches() -> Iterator[Batch]:
        with ThreadPoolExecutor(1) as thread:  # the next one is made while the device works
            ahead = thread.submit(blank_batch, data, packs[0], machine.loss_chunk_tokens)
            for number in range(len(packs)):
                batch = ahead.result()
                if number + 1 < len(packs):
                    ahead = thread.submit(blank_batch, data, packs[number + 1], machine.loss_chunk_tokens)
                console.count(
                    "loading kernels, compiling those that are new", number, len(packs), "sizes of pack"
                )
                yield batch

    started = time.perf_counter()
    warm_up(engine, batches(), plans)
    console.message(
        f"kernels: those for packs of {packs[-1].num_patches:,} to {packs[0].num_patches:,} patches are loaded, "
        f"{time.perf_counter() - started:.0f} s"
    )


def plans_of_levels(levels: TowerLevels) -> list[RecomputePlan]:
    """Plans in which each level of each tower comes once; none where there are no levels.

    Offload runs layer's kernels.
    """
    vision, language = (
        list(dict.fromkeys(Recompute.layer if one is Recompute.offload else one for one in tower))
        for tower in levels
    )
    if not vision or not language:
        return []
    count = max(len(vision), len(language))
    return [
        uniform_plan(vision[number % len(vision)], language[number % len(language)], LAYERS_WARMED_UP)
        for number in range(count)
    ]


def plans_to_warm_up(packed: PackedModel) -> list[RecomputePlan]:
    """One plan for each level that machine.memory=auto chooses from, without offload, which runs layer's kernels."""
    scale = ((Recompute.nothing,) if packed.keeps_more_at_nothing else ()) + level_scale(in_part=True)
    return [uniform_plan(level, level, LAYERS_WARMED_UP) for level in scale if level is not Recompute.offload]


def warm_up(engine: Zero, batches: Iterable[Batch], plans: Sequence[RecomputePlan]) -> None:
    """Forward and backward pass of each batch, its loss times zero, with as many layers as ``plans`` have.

    Batches take the ``plans`` in turn. Large batches come first: the compiler tunes its kernels for the sizes that it
    meets first. Weights, gradients and random numbers stay as they were.
    """
    device = engine.rank.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for number, batch in enumerate(batches):
            output = engine.forward(batch, plan=plans[number % len(plans)])
            engine.backward(output.loss_sum * 0)
