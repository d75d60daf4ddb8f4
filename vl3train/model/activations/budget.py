"""Activation memory as a budget: the least that a pack's layers must compute again so that it fits."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vl3train.config.choices import Recompute
from vl3train.model.activations.work import PackSize, RecomputePlan, RecomputeRates, TowerWork

WORK_A_CROSSING = 10_500
"""Operations that the layers of a GPU at 570 TFLOP/s do while a byte crosses a PCIe link at 54 GB/s (a trace of the 7B,
benchmarks/log.md)."""
OFFLOAD_WORK_A_BYTE = 2 * WORK_A_CROSSING
"""What a byte sent to the host and back counts beside operations done again. So much more than any other level's price
that it is taken last."""


def level_scale(zero_stage: int) -> tuple[Recompute, ...]:
    """The levels that ``machine.memory=auto`` chooses from, dearest in memory first.

    ZeRO-3's linear layers cannot be computed again in part. Where ``nothing`` is measured beside ``elementwise``, what
    those leave of the budget goes to it.
    """
    if zero_stage == 3:
        return (Recompute.nothing, Recompute.layer, Recompute.offload)
    return (Recompute.elementwise, Recompute.mlp, Recompute.layer, Recompute.offload)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationBudget:
    """Bytes that layers may keep for the backward pass, and what each level keeps and does again.

    Each of ``vision_kept`` and ``language_kept`` gives the bytes that one layer keeps of a row at each level that
    may be chosen, dearest in memory first; both have the same levels. What a layer keeps less than the dearest level
    would, it makes again when its backward pass begins: that memory is needed then, by one layer at a time.
    """

    total_bytes: int
    """What both towers keep, which is all there when the language model's backward pass begins, and what this makes
    again for its first layer to run, its last."""
    vision_bytes: int
    """The same of the encoder alone: in its own backward pass the gradients of the language model lie beside them."""
    vision_kept: dict[Recompute, int]
    language_kept: dict[Recompute, int]
    rates: RecomputeRates

    def levels(self, size: PackSize, *, reserved_bytes: int = 0) -> RecomputePlan:
        """The levels with the least work done again, counted in operations, whose bytes fit the budget.

        ``others`` take bytes of the budget too: as many as the pack can spare.

        Exact: layers of a tower are alike, so every count of layers at each level is looked at (4495 for 28 layers
        at 4 levels), about a millisecond. Where nothing fits, the levels that keep least. Elementwise work counts no
        operations, and is the cheapest to do again: it is spared with the bytes that are left over.
        """
        vision = self._choices(self.vision_kept, self.rates.vision, size.patches, size.patch_pairs)
        language = self._choices(self.language_kept, self.rates.language, size.tokens, size.token_pairs)
        order = np.argsort(language.needed_bytes, kind="stable")
        # For each choice in the order of bytes: the first with the least work among it and those before it.
        least_work = np.minimum.accumulate(language.work[order])
        is_less = np.diff(least_work, prepend=least_work[0] + 1) < 0
        best = np.maximum.accumulate(np.where(is_less, np.arange(len(order)), 0))
        spared = self.can_spare(size, reserved_bytes)
        room = self.total_bytes - spared - vision.kept_bytes
        last = np.searchsorted(language.needed_bytes[order], room, side="right") - 1
        fits = (last >= 0) & (vision.needed_bytes <= self._most_of_vision - spared)
        if not fits.any():
            return self.least_kept()
        work = np.where(fits, vision.work + least_work[last], np.iinfo(np.int64).max)
        chosen = int(np.argmin(work))
        levels = RecomputePlan(
            self._spread(self.vision_kept, self.rates.vision, chosen),
            self._spread(self.language_kept, self.rates.language, int(order[best[last[chosen]]])),
        )
        return self._keep_more(size, levels, spared)

    def _keep_more(self, size: PackSize, levels: RecomputePlan, spared: int) -> RecomputePlan:
        """As many layers at nothing in place of elementwise as the rest of the budget has room for, the last first."""
        for tower, kept, rows in (
            ("language", self.language_kept, size.tokens),
            ("vision", self.vision_kept, size.patches),
        ):
            own: tuple[Recompute, ...] = getattr(levels, tower)
            number = own.count(Recompute.elementwise)  # they come last
            if not number or not {Recompute.nothing, Recompute.elementwise} <= kept.keys():
                continue
            more = rows * (kept[Recompute.nothing] - kept[Recompute.elementwise])
            vision, total = self.needed_bytes(size, levels)
            # The last layer of the tower whose backward pass runs makes less again by what it keeps more.
            number = min(number, (self.total_bytes - spared - total) // more + (tower == "language"))
            if tower == "vision":
                number = min(number, (self._most_of_vision - spared - vision) // more + 1)
            number = max(number, 0)
            own = (*own[: len(own) - number], *(Recompute.nothing,) * number)
            levels = levels._replace(**{tower: own})
        return levels

    def room_beside(self, size: PackSize, levels: RecomputePlan) -> list[int]:
        """Bytes of the budget that nobody takes when each layer has run forward, the encoder's layers first.

        So much may others hold from then on, and again until that layer's backward pass ends: what it and the layers
        before it make again is counted.
        """
        kept, room, rooms = 0, self.total_bytes, []
        for tower, kept_of, rows, most in (
            (levels.vision, self.vision_kept, size.patches, self._most_of_vision),
            (levels.language, self.language_kept, size.tokens, self.total_bytes),
        ):
            for level in tower:
                kept += rows * kept_of[level]
                room = min(room, most - kept - rows * _recomputed(kept_of, level))
                rooms.append(max(0, room))
        return rooms

    def can_spare(self, size: PackSize, wanted: int) -> int:
        """Of ``wanted`` bytes, those that a pack can do without: it keeps every layer's input at least.

        Not less, since they are wanted for what is on its way over the link: inputs would have to queue behind it.
        """
        vision, total = self.needed_bytes(size, self._all_at(Recompute.layer))
        return max(0, min(wanted, self.total_bytes - total, self._most_of_vision - vision))

    def least_kept(self) -> RecomputePlan:
        """Every layer at the last level."""
        return self._all_at(list(self.vision_kept)[-1])

    def kept_bytes(self, size: PackSize, levels: RecomputePlan) -> tuple[int, int]:
        """Bytes that the encoder and the language model keep of a pack at these levels."""
        return (
            size.patches * sum(self.vision_kept[level] for level in levels.vision),
            size.tokens * sum(self.language_kept[level] for level in levels.language),
        )

    def needed_bytes(self, size: PackSize, levels: RecomputePlan) -> tuple[int, int]:
        """What a pack takes of ``vision_bytes`` and of ``total_bytes`` at these levels."""
        vision, language = self.kept_bytes(size, levels)
        return (
            vision + size.patches * _recomputed(self.vision_kept, levels.vision[-1]),
            vision + language + size.tokens * _recomputed(self.language_kept, levels.language[-1]),
        )

    @property
    def _most_of_vision(self) -> int:
        return self.vision_bytes if self.rates.vision.has_backward else self.total_bytes

    def _all_at(self, level: Recompute) -> RecomputePlan:
        return RecomputePlan(
            (level,) * self.rates.vision.num_layers, (level,) * self.rates.language.num_layers
        )

    @staticmethod
    def _choices(kept: dict[Recompute, int], work: TowerWork, rows: int, pairs: int) -> Choices:
        """Every way to spread a tower's layers over the levels."""
        scale = _chosen_from(kept)
        counts = _counts(work.num_layers, len(scale))
        recompute = {level: work.of(level, rows, pairs) for level in scale}
        if Recompute.offload in scale:
            recompute[Recompute.offload] += OFFLOAD_WORK_A_BYTE * rows * kept[Recompute.layer]
        kept_bytes = counts @ np.array([rows * kept[level] for level in scale], np.int64)
        recomputed = np.array([rows * _recomputed(kept, level) for level in scale], np.int64)
        level_of_last = np.argmax(counts > 0, axis=1)  # what keeps most comes last, as _spread says
        return Choices(
            kept_bytes,
            kept_bytes + recomputed[level_of_last],
            counts @ np.array(list(recompute.values()), np.int64),
        )

    @staticmethod
    def _spread(kept: dict[Recompute, int], work: TowerWork, choice: int) -> tuple[Recompute, ...]:
        # What keeps most comes last: it is freed first, and offloaded rows have the longest time for their way.
        scale = _chosen_from(kept)
        counts = dict(zip(scale, _counts(work.num_layers, len(scale))[choice].tolist(), strict=True))
        return tuple(level for level in reversed(counts) for _ in range(counts[level]))


class Choices(NamedTuple):
    """Of every way to spread a tower's layers over the levels, (n,) int64 each."""

    kept_bytes: np.ndarray
    needed_bytes: np.ndarray  # with what the last layer makes again
    work: np.ndarray


def _chosen_from(kept: dict[Recompute, int]) -> list[Recompute]:
    """The levels that are weighed by operations: elementwise does as many again as nothing."""
    return [level for level in kept if level is not Recompute.nothing or Recompute.elementwise not in kept]


def _recomputed(kept: dict[Recompute, int], level: Recompute) -> int:
    """Bytes of a row that a layer's backward pass makes again first."""
    return max(kept.values()) - kept[level]


@functools.cache
def _counts(num_layers: int, num_levels: int) -> np.ndarray:
    """Every way to spread layers over levels, (n, num_levels) int64."""
    bars = itertools.combinations(range(num_layers + num_levels - 1), num_levels - 1)
    edges = np.array([(-1, *chosen, num_layers + num_levels - 1) for chosen in bars], np.int64)
    return np.diff(edges, axis=1) - 1
