"""The pack of a plan that takes most memory, and a batch of its shape made of nothing, for a dry run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from vl3train.contracts.records import Batch, Cursor, Pack, RenderedSample
from vl3train.data.batches import collate
from vl3train.data.fetch import OpenData
from vl3train.data.plan import Plan
from vl3train.data.samples import blank_sample

STEPS_SCANNED = 2000
"""Most steps that are looked at, about a millisecond each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstPack:
    """A pack, where it lies, and among how many steps it was looked for."""

    pack: Pack
    step: int
    steps_scanned: int
    steps_left: int  # of the run, those scanned included


def worst_pack(plan: Plan, first: Cursor, last_step: int, bytes_of: Callable[[int, int], int]) -> WorstPack:
    """The pack of steps ``first.step`` to ``last_step`` (not included) with the most bytes.

    ``bytes_of`` gives them from a pack's patches and tokens. Of more than STEPS_SCANNED steps the first so many are
    looked at.
    """
    cursor, worst, step = first, None, first.step
    end = max(first.step + 1, min(last_step, first.step + STEPS_SCANNED))
    while True:
        for pack in plan.step_packs(cursor):
            size = bytes_of(pack.num_patches, pack.num_tokens)
            if worst is None or size > bytes_of(worst.num_patches, worst.num_tokens):
                worst, step = pack, cursor.step
        if cursor.step + 1 >= end:
            break
        cursor = plan.advance(cursor)
    assert worst is not None, "a step has a pack at least"
    return WorstPack(
        pack=worst, step=step, steps_scanned=end - first.step, steps_left=max(1, last_step - first.step)
    )


def blank_batch(data: OpenData, pack: Pack, loss_chunk_tokens: int) -> Batch:
    """A micro-batch with every length of the pack, as the index knows them; no sample is read."""
    samples = [_blank(data, row) for row in pack.samples]
    chunks = max(1, -(-pack.num_supervised_tokens // loss_chunk_tokens))
    return collate(samples, pack, num_loss_chunks=chunks)


def _blank(data: OpenData, row: int) -> RenderedSample:
    planned = data.index.lengths(row)
    sample = blank_sample(planned, key=data.index.key(row), source=data.index.source(row))
    labels = sample.labels.copy()
    labels[: planned.num_supervised_tokens] = 0  # which of them makes no difference
    return dataclasses.replace(sample, labels=labels)
