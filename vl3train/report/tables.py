"""Tables of the report: held-out figures of each run, and how each run went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vl3train.report.html import table_of
from vl3train.report.lineage import PlacedRun
from vl3train.report.run_log import RunLog, clearly_above_chance

Column = tuple[str, Mapping[str, Mapping[str, Any]]]
"""Its head, and the figures of each source."""


def columns_of(placed: Sequence[PlacedRun]) -> list[Column]:
    """The last evaluation of each run; before it that of its start, where the report has no run before it."""
    roots = [one.run for one in placed if one.parent is None]
    found: list[Column] = []
    for one in placed:
        before = one.run.evaluation(first=True)
        if one.parent is None and before is not None:
            found.append(("before" if len(roots) == 1 else f"before {one.run.name}", before))
        if (sources := one.run.evaluation(first=False)) is not None:
            found.append((one.run.name, sources))
    return found


def sources_of(placed: Sequence[PlacedRun]) -> list[str]:
    """Names of all held-out sources."""
    lines = [line for one in placed for line in one.run.evaluations]
    return list(dict.fromkeys(name for line in lines for name in line["sources"]))


def metrics_of(placed: Sequence[PlacedRun]) -> list[tuple[str, str]]:
    """Each source with each metric of its generated answers."""
    found: dict[tuple[str, str], None] = {}
    for one in placed:
        for line in one.run.evaluations:
            for source, row in line["sources"].items():
                found |= {(source, key.removesuffix("_low")): None for key in row if key.endswith("_low")}
    return list(found)


def accuracy_table(columns: Sequence[Column], sources: Sequence[str]) -> str:
    """A row for each source, a column for each evaluation, then chance and the number of samples."""
    rows = []
    for name in sources:
        known = [row.get(name) for _, row in columns]
        last = next((figures for figures in reversed(known) if figures is not None), None)
        if last is None:
            continue
        cells = "".join(_accuracy_cell(figures) for figures in known)
        chance = f"<td>{last['chance']:.0%}</td><td>{last['samples']:.0f}</td>"
        rows.append(f"<tr><td>{escape(name)}</td>{cells}{chance}</tr>")
    return table_of(["task", *(head for head, _ in columns), "chance", "samples"], rows)


def _accuracy_cell(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return "<td></td>"
    kind = ' class="good"' if clearly_above_chance(dict(figures)) else ""
    return f"<td{kind}>{figures['accuracy']:.0%}</td>"


def score_table(columns: Sequence[Column], metrics: Sequence[tuple[str, str]]) -> str:
    """A row for each metric of each source, a column for each evaluation: the mean and its 95 % interval."""
    rows = []
    for source, metric in metrics:
        cells = ""
        for _, row in columns:
            figures = row.get(source, {})
            low, high = figures.get(f"{metric}_low"), figures.get(f"{metric}_high")
            cells += (
                "<td></td>" if low is None else f"<td>{figures[metric]:.3f} ({low:.2f} to {high:.2f})</td>"
            )
        rows.append(f"<tr><td>{escape(f'{source}, {metric}')}</td>{cells}</tr>")
    return table_of(["metric", *(head for head, _ in columns)], rows)


def runs_table(runs: Sequence[RunLog]) -> str:
    """Length, speed and losses of each run; a cell is empty when the run did not log the figure."""

    def mean(run: RunLog, key: str, form: str) -> str:
        values = [line[key] for line in run.steps if line.get(key) is not None]
        return form.format(sum(values) / len(values)) if values else ""

    rows = []
    for run in runs:
        seconds = sum(line.get("step_seconds", 0.0) + line.get("save_seconds", 0.0) for line in run.steps)
        cells = [
            escape(run.name),
            f"{run.steps[-1]['step']:,}",
            f"{run.steps[0]['loss']:.3f}",
            f"{run.steps[-1]['loss']:.3f}",
            f"{seconds / 60:.1f} min",
            mean(run, "tokens_per_second", "{:,.0f}"),
            mean(run, "patches_per_second", "{:,.0f}"),
            mean(run, "fill", "{:.0%}"),
            mean(run, "data_wait_fraction", "{:.0%}"),
            f"{sum(line.get('failed_samples', 0) for line in run.steps)}",
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = [
        "run",
        "steps",
        "first loss",
        "last loss",
        "time",
        "tokens/s",
        "patches/s",
        "fill",
        "data wait",
        "failed samples",
    ]
    return table_of(heads, rows)
