"""Packs that a run tries before its first step: the one that needs most memory, and many sizes; as blank batches."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vl3train.contracts.records import Batch, Cursor, Pack, RenderedSample, SampleLengths
from vl3train.data.collate import collate
from vl3train.data.loader import OpenData
from vl3train.data.plan.plan import Plan
from vl3train.data.render.families import blank_family

STEPS_SCANNED = 2000
"""Most steps that are searched for the worst pack, about a millisecond each."""
STEPS_OF_SIZES = 200
"""Most steps whose sizes of packs are read: many more than are picked, so a fair sample of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstPack:
    """A pack, where it lies, and how many steps were searched for it."""

    pack: Pack
    step: int
    steps_scanned: int
    steps_left: int  # of the run, those scanned included


def worst_pack(plan: Plan, first: Cursor, last_step: int, bytes_of: Callable[[int, int], int]) -> WorstPack:
    """The pack of steps ``first.step`` to ``last_step`` (not included) with the most bytes.

    ``bytes_of`` computes them from a pack's patches and tokens. Only the first STEPS_SCANNED steps are searched.
    """
    worst, step = None, first.step
    end = max(first.step + 1, min(last_step, first.step + STEPS_SCANNED))
    for number, pack in _next_packs(plan, first, end):
        size = bytes_of(pack.num_patches, pack.num_tokens)
        if worst is None or size > bytes_of(worst.num_patches, worst.num_tokens):
            worst, step = pack, number
    assert worst is not None, "a step has a pack at least"
    return WorstPack(
        pack=worst, step=step, steps_scanned=end - first.step, steps_left=max(1, last_step - first.step)
    )


def packs_of_many_sizes(plan: Plan, first: Cursor, last_step: int, count: int) -> list[Pack]:
    """At most ``count`` packs of the run's next steps, evenly from the one with most patches to that with fewest."""
    end = max(first.step + 1, min(last_step, first.step + STEPS_OF_SIZES))
    by_size = {(pack.num_patches, pack.num_tokens): pack for _, pack in _next_packs(plan, first, end)}
    ordered = [by_size[size] for size in sorted(by_size, reverse=True)]
    if len(ordered) <= count:
        return ordered
    return [ordered[i * (len(ordered) - 1) // (count - 1)] for i in range(count)]


def _next_packs(plan: Plan, first: Cursor, end: int) -> Iterator[tuple[int, Pack]]:
    """(step, pack) of steps ``first.step`` to ``end`` (not included)."""
    cursor = first
    for step in itertools.count(first.step):
        for pack in plan.step_packs(cursor):
            yield step, pack
        if step + 1 >= end:
            return
        cursor = plan.advance(cursor)


def blank_batch(data: OpenData, pack: Pack, loss_chunk_tokens: int) -> Batch:
    """A micro-batch with every length of the pack, as the index knows them; no sample is read."""
    samples = [sample for rows in pack.groups for sample in _blank(data, rows)]
    chunks = max(1, -(-pack.num_supervised_tokens // loss_chunk_tokens))
    return collate(samples, pack, num_loss_chunks=chunks)


def _blank(data: OpenData, rows: Sequence[int]) -> list[RenderedSample]:
    planned, keys = [data.index.lengths(row) for row in rows], [data.index.key(row) for row in rows]
    samples = blank_family(planned, keys=keys, source=data.index.source(rows[0]))
    prefixes = len(samples) - len(rows)  # 1 where they share one
    return [*samples[:prefixes], *map(_supervised, samples[prefixes:], planned)]


def _supervised(sample: RenderedSample, planned: SampleLengths) -> RenderedSample:
    labels = sample.labels.copy()
    labels[: planned.num_supervised_tokens] = 0  # which tokens are supervised makes no difference
    return dataclasses.replace(sample, labels=labels)
