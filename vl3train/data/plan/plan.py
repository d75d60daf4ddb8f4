"""Which samples share which pack in which step: a pure function of index, weights, seed and step.

The order of an epoch is cut into steps once, each proved by packing it (cut.py, balance.py): no sample is lost or
repeated, and every rank, worker or resumed run computes the same packs for a step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from vl3train.config.schema import ModelConfig, StepConfig
from vl3train.contracts.records import Cursor, Pack
from vl3train.data.plan import cache as plan_cache
from vl3train.data.plan.balance import SHARE, Rules, pack_step
from vl3train.data.plan.costs import aims_of, caps_of, cost_numbers, mean_pack
from vl3train.data.plan.cut import cut_epoch
from vl3train.data.plan.families import Units, columns_of, make_units
from vl3train.data.plan.order import OrderRules, epoch_counts, epoch_order
from vl3train.data.plan.sample_table import SampleTable

RULES = 2
"""Raised when order, cut or packing change: an older run is then refused at its resume, as its steps would differ."""

UNLIMITED = 1 << 62
"""Records of a step where step.max_samples is none."""

CACHED_FROM_SAMPLES = 300_000
"""Smaller epochs are planned faster (under 0.2 s) than it is worth keeping them on disk."""

SUMMED_AT_A_TIME = 1 << 20


@dataclass(frozen=True, slots=True)
class _Epoch:
    """One virtual epoch: step s has the entries ``order[bounds[s]:bounds[s + 1]]``, each a sample or a unit."""

    order: np.ndarray  # (n,) int32 or int64
    bounds: np.ndarray  # (steps + 1,) int64


@dataclass
class Plan:
    """The packs of every step. Its only state are caches: the last two epochs, and the number of steps of each."""

    table: SampleTable
    seed: int
    step: StepConfig
    costs: dict[str, int] = field(default_factory=lambda: ModelConfig().costs)
    """``model.costs``."""
    order: OrderRules = OrderRules()  # noqa: RUF009 - frozen
    max_family_records: int = 1
    """Most records of one prefix in a pack; at 1 none shares its prefix."""
    cache: Path | None = None
    """Folder where long epochs are kept for the other processes of the node; None keeps none."""
    oversized_samples: tuple[int, ...] = field(init=False)
    """Samples larger than a whole pack, as rows of the table. They are in no step; the caller reports them."""
    units: Units | None = field(init=False)
    """What the plan moves as one; None where each sample is alone."""

    def __post_init__(self) -> None:
        fits = self._read_table()
        costs = cost_numbers(self.costs)
        most = [int(values.max(initial=0)) for values in self._columns[:4]]
        squares = (most[0], most[0] ** 2, most[1], most[3])
        if sum(int(cost) * size for cost, size in zip(costs, squares, strict=True)) >= 2**63 // SHARE:
            raise ValueError(
                f"model.costs={self.costs}: work is counted in 64 bits; take a larger unit for all four"
            )
        means = mean_pack(self._sums(fits), int(fits.sum()), costs, self.step)
        self._most_entries = self.order.max_epoch_samples
        if self.units is not None and self._most_entries is not None:  # the bound is on records
            share = Fraction(sum(self._sizes), len(self.units.rows))
            self._most_entries = max(1, int(self._most_entries * share))
        self._rules = Rules(self.step.global_packs, caps_of(self.step), costs, means)
        self._epochs: dict[int, _Epoch] = {}
        self._num_steps: dict[int, int] = {}

    def _read_table(self) -> np.ndarray:
        """The columns of the units for the compiled code, and which units fit a pack, (n,) bool."""
        table, caps = self.table, caps_of(self.step)
        items = np.zeros(1, np.int32) if table.num_items is None else table.num_items
        fits = (table.num_tokens <= caps[0]) & (table.num_patches <= caps[1]) & (items <= caps[2])
        self.oversized_samples = tuple(np.flatnonzero(~fits).tolist())
        most = min(self.max_family_records, self.step.max_samples or self.max_family_records)
        self.units = make_units(table, fits, int(caps[0]), most)
        self._columns = columns_of(table, self.units)
        if self.units is not None:
            self._sizes = list(self.units.sizes)
            return np.ones(sum(self._sizes), bool)
        ends = np.cumsum(table.sizes)
        self._sizes = [int(fits[end - size : end].sum()) for end, size in zip(ends, table.sizes, strict=True)]
        return np.asarray(fits)

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be computed: the process that receives a plan maps or plans the epochs itself."""
        state = {key: value for key, value in self.__dict__.items() if key != "oversized_samples"}
        return {**state, "_epochs": {}, "_columns": (), "units": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._read_table()

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
            **{f"order.{key}": value for key, value in dataclasses.asdict(self.order).items()},
            "costs": dict(self.costs),
            "rules": RULES,
            # Without it the packs are those of before, and an earlier run may go on.
            **({"max_family_records": self.max_family_records} if self.max_family_records > 1 else {}),
        }

    def steps_in_epoch(self, epoch: int) -> int:
        """Steps of one virtual epoch; the last may be shorter, it still has K packs."""
        if epoch not in self._num_steps:
            folder = self._folder()
            bounds = None if folder is None else plan_cache.load_bounds(folder, epoch, self._epoch_entries())
            self._num_steps[epoch] = len(self._epoch(epoch).bounds if bounds is None else bounds) - 1
        return self._num_steps[epoch]

    def total_steps(self, num_epochs: float) -> int:
        """Steps of ``num_epochs`` virtual epochs, a fraction of the last one rounded to whole steps."""
        whole = int(num_epochs)
        steps = sum(self.steps_in_epoch(epoch) for epoch in range(whole))
        if num_epochs > whole:
            steps += round((num_epochs - whole) * self.steps_in_epoch(whole))
        return max(1, steps)

    def cursor_at(self, step: int, near: Cursor = Cursor()) -> Cursor:  # noqa: B008 - frozen
        """Where global step ``step`` lies. From a cursor ``near`` before it, only the epochs between are counted."""
        if near.step > step:
            near = Cursor()
        epoch, first = near.epoch, near.step - near.step_in_epoch
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
        first, end = epoch.bounds[cursor.step_in_epoch : cursor.step_in_epoch + 2].tolist()
        entries = np.array(epoch.order[first:end])
        found = pack_step(entries, self._columns, self._rules)
        assert found.min() >= 0, "cut_epoch packed this step, so every sample of it has a pack"
        costs = self.entry_costs(entries)
        packs = []
        for number in range(self.step.global_packs):
            (mine,) = np.nonzero(found == number)
            rows, families = self._rows_of(entries[mine]), ()
            if self.units is not None:
                families = tuple(self.units.num_records[entries[mine]].tolist())
            packs.append(
                Pack(
                    samples=tuple(rows.tolist()),
                    num_tokens=int(self._columns.tokens[entries[mine]].sum()),
                    num_patches=int(self._columns.patches[entries[mine]].sum()),
                    num_supervised_tokens=int(self.table.num_supervised_tokens[rows].sum()),
                    cost=int(costs[mine].sum()),
                    families=families if sum(families) > len(families) else (),
                )
            )
        return packs

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """All samples of a virtual epoch, step after step, as rows of the table; read only."""
        return self._rows_of(self.epoch_entries(epoch))

    def epoch_entries(self, epoch: int) -> np.ndarray:
        """All entries of a virtual epoch, step after step: numbers of ``units``, or rows of the table; read only."""
        return self._epoch(epoch).order

    def _rows_of(self, entries: np.ndarray) -> np.ndarray:
        return entries if self.units is None else self.units.rows_of(entries)

    def entry_costs(self, entries: np.ndarray) -> np.ndarray:
        """Work of some entries of an epoch in the units of ``model.costs``, (n,) int64."""
        costs = self._rules.costs
        patches, pairs = (
            values[entries].astype(np.int64) for values in (self._columns.patches, self._columns.pairs)
        )
        return np.asarray(self.language_costs(entries) + costs[2] * patches + costs[3] * pairs)

    def language_costs(self, entries: np.ndarray) -> np.ndarray:
        """The language model's part of ``entry_costs``, (n,) int64."""
        tokens = self._columns.tokens[entries].astype(np.int64)
        fewer = self._columns.fewer_pairs
        pairs = tokens * tokens - (fewer[entries] if len(fewer) > 1 else fewer)
        return np.asarray(self._rules.costs[0] * tokens + self._rules.costs[1] * pairs)

    def _sums(self, fits: np.ndarray) -> dict[str, int]:
        sums = dict.fromkeys(("token", "token_pair", "patch", "patch_pair", "item"), 0)
        for first in range(0, len(fits), SUMMED_AT_A_TIME):
            part = slice(first, first + SUMMED_AT_A_TIME)
            tokens, patches, items, pairs = (
                values[part][fits[part]].astype(np.int64) for values in self._columns[:4]
            )
            found = (tokens, tokens * tokens, patches, pairs, items)
            for name, values in zip(sums, found, strict=True):
                sums[name] += int(values.sum())
        if self.units is not None:
            sums["token_pair"] -= int(self.units.fewer_pairs.sum())
        return {**sums, "record": len(self.units.rows) if self.units is not None else int(fits.sum())}

    def _steps_or_raise(self, epoch: int) -> int:
        steps = self.steps_in_epoch(epoch)
        if not steps:
            raise ValueError("the plan has no sample to train on: every source is empty or rejected")
        return steps

    def _epoch_entries(self) -> int:
        return sum(epoch_counts(self._sizes, self.table.weights, self._most_entries))

    def _folder(self) -> Path | None:
        """Where this plan's epochs are kept, if they are worth it."""
        if self.cache is None or self._epoch_entries() < CACHED_FROM_SAMPLES:
            return None
        return self.cache / self.fingerprint

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            for old in sorted(self._epochs)[:-1]:  # two epochs at most: workers run a little ahead
                del self._epochs[old]
            folder = self._folder()
            kept = None if folder is None else plan_cache.load_epoch(folder, number, self._epoch_entries())
            order, bounds = self._cut(number) if kept is None else kept
            if folder is not None and kept is None:
                plan_cache.save_epoch(folder, number, order, bounds)
            self._epochs[number] = _Epoch(order, bounds)
            self._num_steps[number] = len(bounds) - 1
        return self._epochs[number]

    def _cut(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Order and bounds of an epoch."""
        shards = self.table.shards
        rows = None
        if self.units is not None:
            shards = None if shards is None else shards[self.units.first_rows]
        elif self.oversized_samples:
            fits = np.ones(len(self._columns.tokens), bool)
            fits[list(self.oversized_samples)] = False
            rows = np.flatnonzero(fits)
        order = epoch_order(
            self._sizes,
            self.table.weights,
            seed=self.seed,
            epoch=number,
            rules=dataclasses.replace(self.order, max_epoch_samples=self._most_entries),
            shards=shards if rows is None or shards is None else shards[rows],
        )
        if rows is not None:
            order = rows[order].astype(order.dtype)
        max_samples = UNLIMITED if self.step.max_samples is None else self.step.max_samples
        found: tuple[np.ndarray, np.ndarray] = cut_epoch(
            order, self._columns, self._rules, aims_of(self.step), max_samples
        )
        return found
