"""How far a mean of few answers may lie from the truth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959964
"""Standard deviations that hold 95 % of a normal distribution."""

RESAMPLES = 2000


def mean_with_interval(scores: Sequence[float], groups: Sequence[str]) -> tuple[float, float, float]:
    """Mean, and the bounds of its 95 % confidence interval.

    ``groups`` names what each score belongs to: answers about one clip are right or wrong together, so whole groups
    count as the independent observations. Scores of 0 and 1 with one in each group get Wilson's interval, which stays
    right near 0 and 1; others a bootstrap over groups (2000 resamples, seed 0).

    Raises:
        ValueError: no scores.
    """
    if not scores:
        raise ValueError("no scores to take a mean of")
    mean = math.fsum(scores) / len(scores)
    if len(set(groups)) == len(groups) and set(scores) <= {0.0, 1.0}:
        return mean, *wilson(mean, len(scores))
    names = sorted(set(groups))
    place = {name: i for i, name in enumerate(names)}
    sums, counts = np.zeros(len(names)), np.zeros(len(names))
    for score, group in zip(scores, groups, strict=True):
        sums[place[group]] += score
        counts[place[group]] += 1
    draws = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)
    means = (draws @ sums) / (draws @ counts)
    low, high = np.percentile(means, [2.5, 97.5])
    return mean, float(low), float(high)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Bounds of a share of ``count`` (Wilson 1927).

    >>> [round(bound, 3) for bound in wilson(0.5, 10)], [round(bound, 3) for bound in wilson(1.0, 10)]
    ([0.237, 0.763], [0.722, 1.0])
    """
    centre = share + Z**2 / (2 * count)
    spread = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    scale = 1 + Z**2 / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
