"""The best checkpoint by a held-out figure, and the end of a run that gets no better."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vl3train.config.choices import BestFigure
from vl3train.config.schema import RunConfig
from vl3train.contracts.files import write_whole
from vl3train.contracts.strict_json import json_text
from vl3train.model.weights.headers.manifest import checkpoint_name, step_of

BEST_FILE = "best.json"
"""In a run's folder: the best checkpoint, its figure, and the figures of all evaluations so far."""


@dataclass(slots=True, kw_only=True)
class Best:
    """The held-out figures of a run so far. Every rank has the same."""

    figure: BestFigure
    patience: int | None = None
    history: list[tuple[int, float]] = field(default_factory=list)
    """Step and figure of each evaluation after a step, in order."""

    def count(self, step: int, figures: dict[str, dict[str, Any]]) -> bool:
        """Add an evaluation after ``step``; whether it is the best so far. An earlier one of this step is replaced: a
        run may evaluate its last step twice."""
        if self.figure is BestFigure.none:
            return False
        self.forget_after(step - 1)
        self.history.append((step, value_of(figures, self.figure)))
        return self.step == step

    def forget_after(self, step: int) -> None:
        """The run has gone back: what was evaluated after ``step`` is undone."""
        self.history = [one for one in self.history if one[0] <= step]

    @property
    def step(self) -> int | None:
        """Step of the best evaluation, the earliest of equals; None where there is none."""
        usable = [one for one in self.history if not math.isnan(one[1])]
        sign = 1 if self.figure is BestFigure.loss else -1
        return min(usable, key=lambda one: (sign * one[1], one[0]))[0] if usable else None

    @property
    def evaluations_since(self) -> int:
        """Evaluations after the best one, which were no better."""
        best = self.step
        return sum(1 for step, _ in self.history if best is None or step > best)

    @property
    def is_over(self) -> bool:
        """Whether the run ends early: as many evaluations as run.patience were no better."""
        return self.patience is not None and self.evaluations_since >= self.patience

    def told(self) -> str:
        """The newest evaluation in one line."""
        step, value = self.history[-1]
        if self.step == step:
            return f"held-out {self.figure.value} {value:.4f} after step {step}: the best so far"
        if self.step is None:
            return f"held-out {self.figure.value} {value:.4f} after step {step}"
        best = dict(self.history)[self.step]
        of = "" if self.patience is None else f" of {self.patience}"
        return (
            f"held-out {self.figure.value} {value:.4f} after step {step}; the best is {best:.4f} after step "
            f"{self.step}, {self.evaluations_since}{of} evaluations ago"
        )

    def write(self, folder: Path) -> None:
        """Write BEST_FILE into the run's folder, once the best step has a checkpoint; remove it where none is best."""
        if self.figure is BestFigure.none:
            return
        if self.step is None:
            (folder / BEST_FILE).unlink(missing_ok=True)
            return
        content = {
            "figure": self.figure.value,
            "step": self.step,
            "value": dict(self.history)[self.step],
            "checkpoint": f"checkpoints/{checkpoint_name(self.step)}",
            "history": [{"step": step, "value": value} for step, value in self.history],
        }
        write_whole(folder / BEST_FILE, json_text(content, indent=1) + "\n")


def value_of(figures: dict[str, dict[str, Any]], figure: BestFigure) -> float:
    """One figure of all sources: the loss of a mean supervised token, or the share of samples that are right.

    >>> one, other = {"loss": 1.0, "supervised_tokens": 30}, {"loss": 3.0, "supervised_tokens": 10}
    >>> value_of({"a": one, "b": other}, BestFigure.loss)
    1.5
    """
    weight = "supervised_tokens" if figure is BestFigure.loss else "samples"
    total = sum(source[weight] for source in figures.values())
    if not total:
        return math.nan
    return float(sum(source[figure.value] * source[weight] for source in figures.values()) / total)


def start_best(run: RunConfig, evaluations: list[dict[str, Any]], step: int) -> Best:
    """The figures up to ``step``, from the lines of evaluations.jsonl."""
    best = Best(figure=run.best_figure, patience=run.patience)
    for line in evaluations:
        if line["when"] != "start" and line["step"] <= step:
            best.count(line["step"], line["sources"])
    return best


def best_checkpoint(folder: Path) -> Path | None:
    """The best checkpoint of a run's folder; None where the run kept none.

    Raises:
        ValueError: the file that names it is damaged.
    """
    file = folder / BEST_FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = folder / content["checkpoint"]
        if step_of(found.name) is None:
            raise ValueError(f"{found.name} is no checkpoint")
        if content["step"] != step_of(found.name):
            raise ValueError(f"it names {found.name} and step {content['step']}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is damaged ({error!r}); delete it, and name a checkpoint yourself"
        ) from error
    return found if found.is_dir() else None
