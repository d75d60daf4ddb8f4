"""Steps of the same records, in packs that share prefixes and in packs that do not; and what steps took."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.data.packs import pack_batch
from benchmarks.gpu.engine import OwnEngine
from benchmarks.gpu.family_packs import FamilyMix, Packs, apart, draw_shared
from benchmarks.gpu.model import mix_of
from benchmarks.gpu.rows import Row
from vl3train.contracts.records import Batch
from vl3train.engine.monitor.compile_log import take_compiles
from vl3train.model.activations.flops import FlopRates


def num_warm_up_packs() -> int:
    """Of each kind, which no step has: more sizes than occur. A CPU has no kernels to load."""
    return 24 if torch.cuda.is_available() else 2


@dataclass(frozen=True, kw_only=True)
class FamilyStep:
    """The packs of one optimizer step, and what is in them."""

    batches: list[Batch]
    records: int
    supervised: int
    flops: int


@dataclass(kw_only=True)
class Timed:
    """What steps of one kind took and trained."""

    seconds: list[float]
    steps: list[FamilyStep]
    losses: list[float]

    @property
    def records_a_second(self) -> float:
        """Records trained, over the seconds of all steps."""
        return sum(step.records for step in self.steps) / sum(self.seconds)

    @property
    def tflops(self) -> float:
        """Useful TFLOP/s of all steps."""
        return sum(step.flops for step in self.steps) / sum(self.seconds) / 1e12

    @property
    def flops_a_record(self) -> float:
        """Useful work for each record: a prefix that records share counts once."""
        return sum(step.flops for step in self.steps) / sum(step.records for step in self.steps)

    def __str__(self) -> str:
        rates = f"{self.records_a_second:.4g} records/s at {self.tflops:.4g} useful TFLOP/s"
        what = f"{sum(step.records for step in self.steps)} records, {len(self.steps)} steps"
        return f"{rates} ({what}, last loss {self.losses[-1]:.4f})"


class MixWork:
    """The steps of one mix: the same records in packs that share prefixes, and in packs that do not.

    Records that fill no whole step apart, less than one, are left out there.
    """

    def __init__(self, row: Row, mix: FamilyMix, rates: FlopRates, steps: int) -> None:
        sizes: dict[str, Any] = {"mix": mix, "ids": mix_of(row.model), "max_tokens": row.max_tokens}
        packs, families = draw_shared(steps * row.packs_a_step, seed=0, **sizes)
        self.mix = mix
        self.shared = steps_of(packs, row, rates)
        self.apart = steps_of(apart(families, max_tokens=row.max_tokens, seed=0), row, rates)
        blank = sizes | {"ids": replace(mix_of(row.model), blank=True), "seed": 1}
        self.other_shared, others = draw_shared(num_warm_up_packs(), **blank)
        self.other_apart = apart(others, max_tokens=row.max_tokens, seed=1)[: num_warm_up_packs()]


def steps_of(packs: Packs, row: Row, rates: FlopRates) -> list[FamilyStep]:
    """Whole steps of neighbouring packs."""
    size = row.packs_a_step
    batches = [pack_batch(pack) for pack in packs]
    if torch.cuda.is_available():
        batches = [batch.pin_memory() for batch in batches]
    found = []
    for first in range(0, len(batches) - size + 1, size):
        mine = batches[first : first + size]
        found.append(
            FamilyStep(
                batches=mine,
                records=sum(len(batch.sample_keys) for batch in mine),
                supervised=sum(len(batch.supervised_positions) for batch in mine),
                flops=sum(rates.of(batch) for batch in mine),
            )
        )
    return found


def run(
    own: OwnEngine, ways: dict[str, list[FamilyStep]], tell: Callable[[str], None], firsts: int = 1
) -> dict[str, Timed]:
    """Train the steps of some ways, which take turns so that all are done at the same time.

    The ``firsts`` steps of each are trained once more before that, untimed. A step lasts from the loss before it to
    its own, as in a run: one update is in it, that of the step before.
    """
    turns = [(way, step, False) for way, steps in ways.items() for step in steps[:firsts]]
    places = sorted(
        ((i + 0.5) / len(steps), way, i) for way, steps in ways.items() for i in range(len(steps))
    )
    turns += [(way, ways[way][i], True) for _, way, i in places]
    found = {way: Timed(seconds=[], steps=[], losses=[]) for way in ways}
    take_compiles()
    ended = time.perf_counter()
    for way, step, counts in turns:
        loss = own.step(step.batches, step.supervised)
        started, ended = ended, time.perf_counter()
        took = ended - started
        rates = f"{step.records / took:.4g} records/s, {step.flops / took / 1e12:.4g} useful TFLOP/s"
        label = way if counts else f"{way} (not counted)"
        tell(f"{label}: {took:.3f} s, {rates}, loss {loss:.4f}, {take_compiles()}")
        if counts:
            found[way].seconds.append(took)
            found[way].steps.append(step)
            found[way].losses.append(loss)
    return found
