"""A budget for activation memory: the least recomputation with which a pack fits."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vl3train.config.choices import Recompute
from vl3train.model.activations.work import PackSize, RecomputePlan, RecomputeRates, TowerWork, uniform_plan

WORK_A_CROSSING = 10_500
"""Operations that a GPU at 570 TFLOP/s does while a PCIe link at 54 GB/s moves one byte (a trace of the 7B,
benchmarks/log.md)."""
OFFLOAD_WORK_A_BYTE = 2 * WORK_A_CROSSING
"""The price, in operations, of a byte that goes to the host and back. It is far above any other level's price, so
offload is chosen last."""


def level_scale(*, in_part: bool) -> tuple[Recompute, ...]:
    """The levels that ``machine.memory=auto`` chooses from, the one that keeps most first.

    ``in_part``: whether a part of a layer can be recomputed (PackedModel.recomputes_in_part). engine/memory/fit.py adds
    ``nothing`` to ``elementwise`` where layers keep more at it; it gets what is left of the budget.
    """
    if not in_part:
        return (Recompute.nothing, Recompute.layer, Recompute.offload)
    return (Recompute.elementwise, Recompute.mlp, Recompute.layer, Recompute.offload)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationBudget:
    """Bytes that layers may keep for the backward pass, and what each level keeps and recomputes.

    ``vision_kept`` and ``language_kept`` give the bytes that one layer keeps of a row at each level that may be chosen,
    the level that keeps most first. When the backward pass of a layer begins, it recomputes what its level keeps less
    than the first level: one layer at a time needs that memory too.
    """

    total_bytes: int
    """For what both towers keep when the language model's backward pass begins, and what its last layer recomputes
    then."""
    vision_bytes: int
    """The same for the encoder's own backward pass, in which the gradients of the language model take memory too."""
    vision_kept: dict[Recompute, int]
    language_kept: dict[Recompute, int]
    rates: RecomputeRates

    def plan(self, size: PackSize, *, reserved_bytes: int = 0) -> RecomputePlan:
        """The plan with the fewest recomputed operations whose bytes fit the budget.

        ``reserved_bytes`` are subtracted from the budget first, as far as the pack can spare them.

        Exact: the layers of a tower are alike, so it tries every number of layers at each level (4495 for 28 layers at
        4 levels), in about a millisecond. Where nothing fits, the plan that keeps least. Elementwise work counts no
        operations and is the cheapest to recompute: bytes that are left over save it last.
        """
        vision = self._choices(self.vision_kept, self.rates.vision, size.patches, size.patch_pairs)
        language = self._choices(self.language_kept, self.rates.language, size.tokens, size.token_pairs)
        order = np.argsort(language.needed_bytes, kind="stable")
        # For each choice in the order of bytes: the first one with the least work up to there.
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
        plan = RecomputePlan(
            self._spread(self.vision_kept, self.rates.vision, chosen),
            self._spread(self.language_kept, self.rates.language, int(order[best[last[chosen]]])),
        )
        return self._keep_more(size, plan, spared)

    def _keep_more(self, size: PackSize, plan: RecomputePlan, spared: int) -> RecomputePlan:
        """Change layers from elementwise to nothing, the last first, as far as the rest of the budget allows."""
        for tower, kept, rows in (
            ("language", self.language_kept, size.tokens),
            ("vision", self.vision_kept, size.patches),
        ):
            own: tuple[Recompute, ...] = getattr(plan, tower)
            number = own.count(Recompute.elementwise)  # they come last
            if not number or not {Recompute.nothing, Recompute.elementwise} <= kept.keys():
                continue
            more = rows * (kept[Recompute.nothing] - kept[Recompute.elementwise])
            vision, total = self.needed_bytes(size, plan)
            # The last layer of the tower whose backward pass runs recomputes less by what it keeps more.
            number = min(number, (self.total_bytes - spared - total) // more + (tower == "language"))
            if tower == "vision":
                number = min(number, (self._most_of_vision - spared - vision) // more + 1)
            number = max(number, 0)
            own = (*own[: len(own) - number], *(Recompute.nothing,) * number)
            plan = plan._replace(**{tower: own})
        return plan

    def room_beside(self, size: PackSize, plan: RecomputePlan) -> list[int]:
        """Bytes of the budget that activations leave free once each layer has run forward, the encoder's layers first.

        Optimizer state may take them from then on, and once more until that layer's backward pass ends: what it and the
        layers before it recompute is subtracted.
        """
        kept, room, rooms = 0, self.total_bytes, []
        for tower, kept_of, rows, most in (
            (plan.vision, self.vision_kept, size.patches, self._most_of_vision),
            (plan.language, self.language_kept, size.tokens, self.total_bytes),
        ):
            for level in tower:
                kept += rows * kept_of[level]
                room = min(room, most - kept - rows * _recomputed(kept_of, level))
                rooms.append(max(0, room))
        return rooms

    def can_spare(self, size: PackSize, wanted: int) -> int:
        """How many of the ``wanted`` bytes a pack can spare and still keep every layer's input on the device.

        Inputs are not offloaded for this: the bytes are for optimizer state that is crossing the link, and inputs would
        queue behind it.
        """
        vision, total = self.needed_bytes(size, self._all_at(Recompute.layer))
        return max(0, min(wanted, self.total_bytes - total, self._most_of_vision - vision))

    def least_kept(self) -> RecomputePlan:
        """The plan with every layer at the level that keeps least."""
        return self._all_at(list(self.vision_kept)[-1])

    def kept_bytes(self, size: PackSize, plan: RecomputePlan) -> tuple[int, int]:
        """Bytes that the encoder and the language model keep of a pack."""
        return (
            size.patches * sum(self.vision_kept[level] for level in plan.vision),
            size.tokens * sum(self.language_kept[level] for level in plan.language),
        )

    def needed_bytes(self, size: PackSize, plan: RecomputePlan) -> tuple[int, int]:
        """What a pack takes of ``vision_bytes`` and of ``total_bytes``."""
        vision, language = self.kept_bytes(size, plan)
        return (
            vision + size.patches * _recomputed(self.vision_kept, plan.vision[-1]),
            vision + language + size.tokens * _recomputed(self.language_kept, plan.language[-1]),
        )

    @property
    def _most_of_vision(self) -> int:
        return self.vision_bytes if self.rates.vision.has_backward else self.total_bytes

    def _all_at(self, level: Recompute) -> RecomputePlan:
        return uniform_plan(level, level, (self.rates.vision.num_layers, self.rates.language.num_layers))

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
        level_of_last = np.argmax(counts > 0, axis=1)  # the level that keeps most comes last, as in _spread
        return Choices(
            kept_bytes,
            kept_bytes + recomputed[level_of_last],
            counts @ np.array(list(recompute.values()), np.int64),
        )

    @staticmethod
    def _spread(kept: dict[Recompute, int], work: TowerWork, choice: int) -> tuple[Recompute, ...]:
        # Levels that keep most come last: their memory is freed first, and offloaded rows have the most time to return.
        scale = _chosen_from(kept)
        counts = dict(zip(scale, _counts(work.num_layers, len(scale))[choice].tolist(), strict=True))
        return tuple(level for level in reversed(counts) for _ in range(counts[level]))


class Choices(NamedTuple):
    """Of every way to spread a tower's layers over the levels, (n,) int64 each."""

    kept_bytes: np.ndarray
    needed_bytes: np.ndarray  # with what the last layer recomputes
    work: np.ndarray  # recomputed operations


def _chosen_from(kept: dict[Recompute, int]) -> list[Recompute]:
    """The levels that are compared by operations. Without nothing beside elementwise: both recompute no operations."""
    return [level for level in kept if level is not Recompute.nothing or Recompute.elementwise not in kept]


def _recomputed(kept: dict[Recompute, int], level: Recompute) -> int:
    """Bytes of a row that a layer recomputes when its backward pass begins."""
    return max(kept.values()) - kept[level]


@functools.cache
def _counts(num_layers: int, num_levels: int) -> np.ndarray:
    """Every way to spread layers over levels, (n, num_levels) int64."""
    bars = itertools.combinations(range(num_layers + num_levels - 1), num_levels - 1)
    edges = np.array([(-1, *chosen, num_layers + num_levels - 1) for chosen in bars], np.int64)
    return np.diff(edges, axis=1) - 1
