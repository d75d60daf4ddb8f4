"""What a step's loss and gradient norm may be, from those of the good steps before it.

The median and the median absolute deviation of a window, because a mean and a standard deviation would follow the very
outliers that they are to find. The loss and the norm fall during a training, so old steps leave the window.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from vl3train.engine.step import NO_LIMITS, Limits

WINDOW = 64
"""Steps. Half of them must be there: before, a run warms up and its loss falls fast, and there is no limit."""
NORMAL = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""
LEAST_LOSS_DEVIATION = 0.1
"""Nats: a loss that hardly varies, near its end, may still meet a sample that nothing prepared the model for."""
LEAST_NORM_DEVIATION = 0.5
"""Of the median norm: clipping makes a norm of a few times the median harmless, and batches without supervised text
have norms near 0."""


class SpikeLimits:
    """The last good steps' losses and norms, and the limits that they give."""

    def __init__(self, deviations: float) -> None:
        """``deviations`` is ``optim.spike_limit``; 0 gives no limits."""
        self._deviations = deviations
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)

    def add(self, loss: float, grad_norm: float) -> None:
        """Take in a good step."""
        self._losses.append(loss)
        self._norms.append(grad_norm)

    def limits(self) -> Limits:
        """The limits of the next step."""
        if not self._deviations or len(self._losses) < WINDOW // 2:
            return NO_LIMITS
        norm = statistics.median(self._norms)
        return Limits(
            loss=self._limit(self._losses, LEAST_LOSS_DEVIATION),
            grad_norm=self._limit(self._norms, LEAST_NORM_DEVIATION * norm),
        )

    def _limit(self, values: Sequence[float], least: float) -> float:
        median = statistics.median(values)
        deviation = NORMAL * statistics.median(abs(value - median) for value in values)
        limit = median + self._deviations * max(deviation, least)
        return limit if math.isfinite(limit) else NO_LIMITS.loss

    def state(self) -> dict[str, Any]:
        """As resume.json keeps it."""
        return {"losses": list(self._losses), "grad_norms": list(self._norms)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a ``state()``."""
        self._losses = deque(state["losses"], maxlen=WINDOW)
        self._norms = deque(state["grad_norms"], maxlen=WINDOW)
