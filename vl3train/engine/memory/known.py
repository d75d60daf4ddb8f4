"""What an earlier start found of the memory, for a run of the same model, settings and machine.

The budget that it found to fit needs one dry run then, not eight to eleven; and only the levels of recomputation that
steps took need to be compiled before the first step. A level that comes later is compiled in its step, which says so.
"""

from __future__ import annotations

import contextlib
import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vl3train.config.choices import Recompute
from vl3train.config.plain import as_plain
from vl3train.config.schema import TrainConfig
from vl3train.contracts.kept import keep, read_kept
from vl3train.engine.ranks import Rank
from vl3train.model.activations.budget import ActivationBudget
from vl3train.model.activations.work import RecomputePlan, RecomputeRates, recompute_rates
from vl3train.model.compiling import sources_tag
from vl3train.model.machine_key import machine_key
from vl3train.model.packed_forward import PackedModel

TowerLevels = tuple[tuple[Recompute, ...], tuple[Recompute, ...]]
"""Of the encoder and of the language model, in the order of ``Recompute``."""
NO_LEVELS: TowerLevels = ((), ())


class KnownFit:
    """What is kept of one kind of run. ``budget`` is None where nothing is, or it was for lighter packs."""

    def __init__(self, key: dict[str, Any], worst_bytes: int, rates: RecomputeRates, rank: Rank) -> None:
        """``worst_bytes`` says how heavy the run's worst pack is. All ranks call it, with the same arguments."""
        self._key, self._rank, self._worst_bytes, self.rates = key, rank, worst_bytes, rates
        self.budget = _budget_in(rank.gather(read_kept(key))[0], worst_bytes, rates)
        own = _levels_in(read_kept(self._key_of_levels)) if self.budget is not None else NO_LEVELS
        of_ranks = rank.gather(own)
        self.levels = _ordered(*({level for one in of_ranks for level in one[tower]} for tower in range(2)))
        self._seen: tuple[set[Recompute], set[Recompute]] = (set(own[0]), set(own[1]))
        """TowerLevels that this rank's steps took, now or in an earlier run."""

    @property
    def _key_of_levels(self) -> dict[str, Any]:
        return {**self._key, "levels of rank": self._rank.index}

    def found(self, budget: ActivationBudget) -> None:
        """Keep a budget that a dry run has shown to fit."""
        if self._rank.is_first:
            kept = {
                name: {level.value: size for level, size in getattr(budget, name).items()}
                for name in ("vision_kept", "language_kept")
            }
            sizes = {"total_bytes": budget.total_bytes, "vision_bytes": budget.vision_bytes}
            keep(self._key, {"worst_bytes": self._worst_bytes, **sizes, **kept})

    def note(self, plan: RecomputePlan) -> None:
        """Remember the levels of a step's plan."""
        if self._seen[0].issuperset(plan.vision) and self._seen[1].issuperset(plan.language):
            return
        for seen, levels in zip(self._seen, plan, strict=True):
            seen.update(levels)
        keep(self._key_of_levels, [[level.value for level in tower] for tower in _ordered(*self._seen)])


def known_fit(
    cfg: TrainConfig, packed: PackedModel, rank: Rank, *, worst_bytes: int, limit_bytes: int
) -> KnownFit:
    """What is known of a run whose worst pack is so heavy, in a process that may hold so much. All ranks call it."""
    model: Any = packed.model
    parameters = hashlib.sha256()
    for name, parameter in model.named_parameters():
        parameters.update(
            f"{name} {tuple(parameter.shape)} {parameter.dtype} {parameter.requires_grad}\n".encode()
        )
    key = {
        "what": "memory=auto",
        **machine_key(rank.device),
        "sources of the engine": sources_tag(Path(__file__).parents[1]),
        "deepspeed": version("deepspeed"),
        "transformers": version("transformers"),
        "parameters": parameters.hexdigest(),
        "model": hashlib.sha256(model.config.to_json_string().encode()).hexdigest(),
        "machine": as_plain(cfg.machine),
        "step": as_plain(cfg.step),
        "optim": as_plain(cfg.optim),
        "adapter": as_plain(cfg.adapter),
        "kernels": [packed.attention, packed.gemm_backend],
        "ranks": rank.dp_size,
        "GiB": round(limit_bytes / 2**30),
    }
    rates = recompute_rates(model, recomputes_logits=not packed.makes_logits_once)
    return KnownFit(key, worst_bytes, rates, rank)


def _budget_in(value: Any, worst_bytes: int, rates: RecomputeRates) -> ActivationBudget | None:
    """A budget as it was kept; None where it is none, or was for a lighter pack."""
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        kept = {
            name: {Recompute(level): int(size) for level, size in value[name].items()}
            for name in ("vision_kept", "language_kept")
        }
        if int(value["worst_bytes"]) >= worst_bytes and all(kept.values()):
            return ActivationBudget(
                total_bytes=int(value["total_bytes"]),
                vision_bytes=int(value["vision_bytes"]),
                rates=rates,
                **kept,
            )
    return None


def _levels_in(value: Any) -> TowerLevels:
    with contextlib.suppress(TypeError, ValueError):
        vision, language = ({Recompute(level) for level in tower} for tower in value)
        return _ordered(vision, language)
    return NO_LEVELS


def _ordered(vision: set[Recompute], language: set[Recompute]) -> TowerLevels:
    order = list(Recompute)
    return tuple(sorted(vision, key=order.index)), tuple(sorted(language, key=order.index))
