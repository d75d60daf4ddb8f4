"""What a run remembers of its steps to know a bad one, and which steps it passes over. resume.json keeps all of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vl3train.config.optim_options import OptimConfig
from vl3train.contracts.records import Cursor
from vl3train.data.plan.plan import Plan
from vl3train.engine.bad_steps.limits import SpikeLimits
from vl3train.engine.step import StepResult


class BadSteps:
    """The limits of the next step, the skipped steps in a row, and the ranges of steps that are passed over."""

    def __init__(self, optim: OptimConfig) -> None:
        """Of a new run."""
        self.spikes = SpikeLimits(optim.spike_limit)
        self.max_in_a_row = optim.max_skipped_steps
        self.in_a_row = 0
        self.row_start = 0  # the first step of the row
        self.has_trained = False  # whether a step of the run was good
        self.passed_over: list[tuple[int, int]] = []
        """Ranges of steps, the second not included, in the order in which the run gave them up."""

    def count(self, step: int, result: StepResult) -> None:
        """Take in one step. Numbers of a skipped one never become part of the limits."""
        if not result.is_skipped:
            self.in_a_row, self.has_trained = 0, True
            self.spikes.add(result.loss, result.grad_norm)
            return
        self.row_start = self.row_start if self.in_a_row else step
        self.in_a_row += 1

    @property
    def too_many(self) -> bool:
        """Whether the run must go back."""
        return self.in_a_row >= self.max_in_a_row

    def range_to_pass_over(self, next_step: int) -> tuple[int, int]:
        """The row of skipped steps that ends before ``next_step``, and as many good steps before it."""
        return max(0, self.row_start - self.max_in_a_row), next_step

    def keep_before(self, step: int) -> int:
        """A save after ``step`` steps must leave a checkpoint of this step or an earlier one: a row that is just not
        long enough could begin ``max_in_a_row`` steps before, and its range as many before that."""
        return step - 2 * self.max_in_a_row

    def range_ahead(self, step: int, last_step: int) -> int:
        """The first step from ``step`` on that is passed over, or ``last_step``."""
        return min([last_step, *(first for first, _ in self.passed_over if first > step)])

    def jump(self, plan: Plan, cursor: Cursor, last_step: int) -> Cursor:
        """``cursor``, or where it lies in a range that is passed over, the end of that range."""
        for first, end in sorted(self.passed_over):
            if first <= cursor.step < end:
                cursor = plan.cursor_at(min(end, last_step), near=cursor)
        return cursor

    def state(self) -> dict[str, Any]:
        """As resume.json keeps it."""
        return {
            "limits": self.spikes.state(),
            "in_a_row": self.in_a_row,
            "row_start": self.row_start,
            "passed_over": [list(one) for one in self.passed_over],
        }

    def load(self, resume: Mapping[str, Any]) -> None:
        """Take the state of a resume.json. Before 2026-12 it had none: the window is then filled anew."""
        self.has_trained = True
        if "bad_steps" not in resume:
            return
        state = resume["bad_steps"]
        self.has_trained = bool(state["limits"]["losses"])  # of good steps only
        self.spikes.load(state["limits"])
        self.in_a_row, self.row_start = state["in_a_row"], state["row_start"]
        self.passed_over = [(first, end) for first, end in state["passed_over"]]
