"""What samples cost, and how packs go to ranks: integer arithmetic only, so equal on every machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from vl3train.config.schema import StepConfig
from vl3train.contracts.records import Pack

COSTS = ("token", "token_pair", "patch", "patch_pair")
"""Entries of ``model.costs`` in the order of the compiled code. Attention is per sample in the language model and
per frame in the encoder."""


def cost_numbers(costs: Mapping[str, int]) -> np.ndarray:
    """``model.costs`` as (4,) int64.

    >>> cost_numbers({"patch": 3, "patch_pair": 4, "token": 1, "token_pair": 2}).tolist()
    [1, 2, 3, 4]
    """
    return np.array([costs[name] for name in COSTS], np.int64)


def caps_of(step: StepConfig) -> np.ndarray:
    """Most tokens, patches and visual items of one pack, (3,) int64."""
    return np.array([step.max_tokens, step.max_patches, step.max_visual_items or 2**31], np.int64)


def aims_of(step: StepConfig) -> np.ndarray:
    """Tokens, patches and visual items at which a step closes, (3,) int64."""
    return np.array([int(step.fill * step.global_packs * int(cap)) for cap in caps_of(step)], np.int64)


def mean_pack(sums: Mapping[str, int], num_samples: int, costs: np.ndarray, step: StepConfig) -> np.ndarray:
    """Work of a mean pack: in all, of the language model, of the encoder; then the caps on tokens and patches.

    A step has as many mean samples as the first of its limits allows.

    Args:
        sums: over the plan's samples, of ``token``, ``token_pair``, ``patch``, ``patch_pair``, ``item`` and ``record``.
        num_samples: of the plan, those that share a prefix as one.
        costs: (4,), see ``cost_numbers``.
        step: limits of a step.

    Returns:
        (5,) int64, at least 1 each
    """
    samples = [Fraction(step.max_samples * num_samples, max(1, sums["record"]))] if step.max_samples else []
    for aim, name in zip(aims_of(step).tolist(), ("token", "patch", "item"), strict=True):
        if sums[name]:
            samples.append(Fraction(aim * num_samples, sums[name]))
    share = min(samples, default=Fraction(1)) / (max(1, num_samples) * step.global_packs)
    work = [int(cost) * sums[name] for cost, name in zip(costs, COSTS, strict=True)]
    means = [int(share * part) for part in (sum(work), work[0] + work[1], work[2] + work[3])]
    return np.array([max(1, mean) for mean in means] + caps_of(step).tolist()[:2], np.int64)


def rank_packs(packs: Sequence[Pack], rank: int, dp_size: int) -> list[Pack]:
    """The packs of one rank in the order it runs them: as many on each rank, balanced, costliest first.

    The costliest pack first, to the rank with the least work that still has a place (LPT). Running them in
    falling cost pairs packs of like cost across the ranks, which wait for each other in every micro-batch.
    """
    if len(packs) % dp_size:
        raise ValueError(f"step.global_packs={len(packs)} does not divide over {dp_size} ranks")
    work, mine = [0] * dp_size, [[] for _ in range(dp_size)]  # type: tuple[list[int], list[list[Pack]]]
    for i in sorted(range(len(packs)), key=lambda i: (-packs[i].cost, i)):
        open_ranks = [r for r in range(dp_size) if len(mine[r]) < len(packs) // dp_size]
        chosen = min(open_ranks, key=lambda r: (work[r], r))
        mine[chosen].append(packs[i])
        work[chosen] += packs[i].cost
    return mine[rank]
