"""Which samples share which pack in which step: a pure function of index, weights, seed and step.

The order of an epoch is cut into steps, greedily, where the samples would fill K packs to ``fill``. Every cut
is proved by packing it: a cut whose samples do not go into K packs moves earlier. So no sample is ever dropped
by the packing, and any rank, worker or resumed run that asks gets the same packs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field

import numpy as np

from vl3train.config.schema import StepConfig
from vl3train.contracts.records import Cursor, Pack
from vl3train.data.order import epoch_order
from vl3train.data.packing import (
    KFLOP_PATCH,
    KFLOP_PATCH_PAIR,
    KFLOP_TOKEN,
    KFLOP_TOKEN_PAIR,
    pack_samples,
    sample_costs,
)

RULES = 1
"""Raised when order, cut or packing come to differ: an older run is then refused instead of mis-resumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleTable:
    """What the plan reads of the index: one entry for each usable sample, source after source."""

    sizes: tuple[int, ...]  # samples of each source
    weights: tuple[float, ...]  # of each source
    num_tokens: np.ndarray  # (n,) int64
    num_supervised_tokens: np.ndarray  # (n,) int64
    num_patches: np.ndarray  # (n,) int64
    num_patch_pairs: np.ndarray  # (n,) int64
    fingerprint: str  # of the index


@dataclass(frozen=True, slots=True)
class _Epoch:
    """One virtual epoch, planned: entry i is sample ``order[i]``, in pack ``pack[i]`` of its step."""

    order: np.ndarray  # (n,) int64
    starts: list[int]  # steps + 1
    pack: np.ndarray  # (n,) int32


@dataclass
class Plan:
    """The packs of every step. What it keeps are caches only: the last two epochs and the count of each."""

    table: SampleTable
    seed: int
    step: StepConfig
    dropped_samples: tuple[int, ...] = field(init=False)
    """Samples larger than a whole pack, as rows of the table. They are in no step; the caller says so."""

    def __post_init__(self) -> None:
        table, step = self.table, self.step
        self._costs = sample_costs(table.num_tokens, table.num_patches, table.num_patch_pairs)
        fits = (table.num_tokens <= step.max_tokens) & (table.num_patches <= step.max_patches)
        self.dropped_samples = tuple(np.flatnonzero(~fits).tolist())
        self._rows = np.flatnonzero(fits)
        ends = np.cumsum(table.sizes)
        self._sizes = [int(fits[end - size : end].sum()) for end, size in zip(ends, table.sizes, strict=True)]
        self._epochs: dict[int, _Epoch] = {}
        self._num_steps: dict[int, int] = {}

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits of everything that decides the packs of a step."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:16]

    def describe(self) -> dict[str, object]:
        """What the fingerprint is made of, for a message that says what differs."""
        return {
            "index": self.table.fingerprint,
            "weights": list(self.table.weights),
            "seed": self.seed,
            **{f"step.{key}": value for key, value in dataclasses.asdict(self.step).items()},
            "costs": [KFLOP_TOKEN, KFLOP_TOKEN_PAIR, KFLOP_PATCH, KFLOP_PATCH_PAIR],
            "rules": RULES,
        }

    def steps_in_epoch(self, epoch: int) -> int:
        """Steps of one virtual epoch; the last may be shorter, it still has K packs."""
        if epoch not in self._num_steps:
            self._epoch(epoch)
        return self._num_steps[epoch]

    def total_steps(self, num_epochs: float) -> int:
        """Steps of ``num_epochs`` virtual epochs, a fraction of the last one rounded to whole steps."""
        whole = int(num_epochs)
        steps = sum(self.steps_in_epoch(epoch) for epoch in range(whole))
        if num_epochs > whole:
            steps += round((num_epochs - whole) * self.steps_in_epoch(whole))
        return max(1, steps)

    def cursor_at(self, step: int) -> Cursor:
        """Where global step ``step`` lies."""
        epoch, first = 0, 0
        while step >= first + self._steps_or_raise(epoch):
            first += self.steps_in_epoch(epoch)
            epoch += 1
        return Cursor(epoch=epoch, step_in_epoch=step - first, step=step)

    def advance(self, cursor: Cursor) -> Cursor:
        """The cursor of the next step."""
        if cursor.step_in_epoch + 1 < self._steps_or_raise(cursor.epoch):
            return dataclasses.replace(cursor, step_in_epoch=cursor.step_in_epoch + 1, step=cursor.step + 1)
        return Cursor(epoch=cursor.epoch + 1, step_in_epoch=0, step=cursor.step + 1)

    def step_packs(self, cursor: Cursor) -> list[Pack]:
        """The K packs of one step; a pack may be empty. ``Pack.samples`` are rows of the table."""
        epoch = self._epoch(cursor.epoch)
        first, end = epoch.starts[cursor.step_in_epoch], epoch.starts[cursor.step_in_epoch + 1]
        members: list[list[int]] = [[] for _ in range(self.step.global_packs)]
        for row, pack in zip(epoch.order[first:end].tolist(), epoch.pack[first:end].tolist(), strict=True):
            members[pack].append(row)
        return [
            Pack(
                samples=tuple(rows),
                num_tokens=int(self.table.num_tokens[rows].sum()),
                num_patches=int(self.table.num_patches[rows].sum()),
                num_supervised_tokens=int(self.table.num_supervised_tokens[rows].sum()),
                cost=int(self._costs[rows].sum()),
            )
            for rows in members
        ]

    def _steps_or_raise(self, epoch: int) -> int:
        steps = self.steps_in_epoch(epoch)
        if not steps:
            raise ValueError("the plan has no sample to train on: every source is empty or refused")
        return steps

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            for old in sorted(self._epochs)[:-1]:  # two epochs at most: workers run a little ahead
                del self._epochs[old]
            order = self._rows[epoch_order(self._sizes, self.table.weights, seed=self.seed, epoch=epoch)]
            starts, pack = self._cut(order)
            self._epochs[epoch] = _Epoch(order, starts, pack)
            self._num_steps[epoch] = len(starts) - 1
        return self._epochs[epoch]

    def _cut(self, order: np.ndarray) -> tuple[list[int], np.ndarray]:
        """Bounds of the steps and each entry's pack."""
        tokens, patches = self.table.num_tokens[order], self.table.num_patches[order]
        costs = self._costs[order]
        packs, caps = self.step.global_packs, (self.step.max_tokens, self.step.max_patches)
        sums = [np.concatenate([[0], np.cumsum(sizes)]) for sizes in (tokens, patches)]
        aims = [int(self.step.fill * packs * cap) for cap in caps]
        assignment = np.zeros(len(order), np.int32)
        starts = [0]
        while starts[-1] < len(order):
            first = starts[-1]
            ends = [
                int(np.searchsorted(sum_, sum_[first] + aim, "right")) - 1
                for sum_, aim in zip(sums, aims, strict=True)
            ]
            limit = len(order) if self.step.max_samples is None else first + self.step.max_samples
            end = max(first + 1, min(*ends, limit, len(order)))  # one sample fits alone, whatever fill says

            def packed(end: int, first: int = first) -> list[int] | None:
                part = slice(first, end)
                sizes = [values[part].tolist() for values in (tokens, patches, costs)]
                return pack_samples(*sizes, packs=packs, caps=caps)

            found = packed(end)
            good, bad = min(first + packs, end), end  # K samples fit always: one in each pack
            while found is None and bad - good > 1:
                middle = (good + bad) // 2
                if packed(middle) is None:
                    bad = middle
                else:
                    good = middle
            if found is None:
                end, found = good, packed(good)
            assert found is not None, "K samples that each fit a pack did not go into K packs"
            assignment[first:end] = found
            starts.append(end)
        return starts, assignment
