"""What the runs of a sweep reached: a table for the console, and results.csv."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vl3train.config.choices import BestFigure
from vl3train.contracts.files import write_whole
from vl3train.engine.best import value_of
from vl3train.engine.held_out.evaluations_file import EVALUATIONS, read_evaluations
from vl3train.report.run_log import read_run

RESULTS = "results.csv"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One run of a sweep. A figure that it has not is None."""

    name: str
    values: dict[str, str]  # of the options that differ
    outcome: str  # finished, failed (exit code 1), stopped, not started
    held_out_loss: float | None = None  # of its best evaluation
    held_out_accuracy: float | None = None  # of the same
    step: int | None = None  # of the same
    train_loss: float | None = None  # of the last step
    seconds: float | None = None  # of all steps


def result_of(folder: Path, values: dict[str, str], outcome: str, figure: BestFigure) -> Result:
    """Read what a run left. Its best evaluation is that with the best ``figure``; without one, with the least loss."""
    log = read_run(folder, [])
    if log is None:
        return Result(name=folder.name, values=values, outcome=outcome)
    evaluations = [line for line in read_evaluations(folder / EVALUATIONS) if line["when"] != "start"]
    sign = -1 if figure is BestFigure.accuracy else 1
    by = BestFigure.accuracy if figure is BestFigure.accuracy else BestFigure.loss
    scored = [(sign * value_of(line["sources"], by), line["step"], line["sources"]) for line in evaluations]
    best = min((one for one in scored if not math.isnan(one[0])), key=lambda one: one[:2], default=None)
    return Result(
        name=folder.name,
        values=values,
        outcome=outcome,
        held_out_loss=None if best is None else value_of(best[2], BestFigure.loss),
        held_out_accuracy=None if best is None else value_of(best[2], BestFigure.accuracy),
        step=None if best is None else best[1],
        train_loss=log.steps[-1]["loss"],
        seconds=sum(line.get("step_seconds", 0.0) + line.get("save_seconds", 0.0) for line in log.steps),
    )


def best_of(results: Sequence[Result], figure: BestFigure) -> Result | None:
    """The run with the best held-out figure; None where none has any."""
    known = [one for one in results if one.held_out_loss is not None and one.held_out_accuracy is not None]
    if figure is BestFigure.accuracy:
        return max(known, key=lambda one: one.held_out_accuracy or 0.0, default=None)
    return min(known, key=lambda one: one.held_out_loss or 0.0, default=None)


def rows_of(results: Sequence[Result]) -> list[dict[str, str]]:
    """As the console shows them."""
    return [
        {
            **one.values,
            "run": one.outcome,
            "held-out loss": _form("{:.4f}", one.held_out_loss),
            "accuracy": _form("{:.1%}", one.held_out_accuracy),
            "after step": _form("{}", one.step),
            "train loss": _form("{:.4f}", one.train_loss),
            "seconds": _form("{:.0f}", one.seconds),
        }
        for one in results
    ]


def _form(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


def write_results(folder: Path, results: Sequence[Result]) -> Path:
    """Write results.csv, whole; returns its path."""
    keys = list(dict.fromkeys(key for one in results for key in one.values))
    figures = ("outcome", "held_out_loss", "held_out_accuracy", "step", "train_loss", "seconds")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *keys, *figures])
    for one in results:
        values = [one.values.get(key, "") for key in keys]
        writer.writerow([one.name, *values, *(getattr(one, name) for name in figures)])
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RESULTS, text.getvalue())
    return folder / RESULTS
