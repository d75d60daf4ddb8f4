"""The figures of the report: small panels as PNG, each for light and for dark pages."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from vl3train.report.lineage import PlacedRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LIGHT = {"page": "#ffffff", "ink": "#24292f", "faint": "#d8dee4"}
DARK = {"page": "#161b22", "ink": "#c9d1d9", "faint": "#30363d"}
COLORS = ("#2f81f7", "#e36209", "#2da44e", "#bf3989", "#b08800", "#8250df", "#1b8a94", "#cf222e")
"""Of the runs, in their order; they can be told apart on light and on dark pages."""
INCHES = (3.7, 2.5)
"""Small enough that the words of a panel can be read where it fills a phone's width."""

Draw = Callable[[Any, str, PlacedRun], None]
Panel = dict[bool, bytes]
"""A figure for a light (False) and a dark (True) page."""


def color_of(number: int) -> str:
    """Of the run with this number."""
    return COLORS[number % len(COLORS)]


def loss_panel(placed: Sequence[PlacedRun]) -> Panel:
    """Loss of the steps: a faint line of every step, and the running mean on top."""

    def draw(axes: Axes, color: str, one: PlacedRun) -> None:
        steps, losses = one.steps("loss")
        axes.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, running_mean(losses), color=color, linewidth=1.8)

    return panel("training loss per supervised token", placed, draw, bottom=0)


def step_panel(title: str, key: str, placed: Sequence[PlacedRun], *, factor: float = 1.0) -> Panel:
    """The running mean of a figure of the step log."""

    def draw(axes: Axes, color: str, one: PlacedRun) -> None:
        steps, values = one.steps(key)
        axes.plot(steps, running_mean([factor * value for value in values]), color=color, linewidth=1.6)

    return panel(title, placed, draw, bottom=0)


def failed_panel(placed: Sequence[PlacedRun]) -> Panel:
    """Failed samples so far in each run."""

    def draw(axes: Axes, color: str, one: PlacedRun) -> None:
        steps, counts = one.steps("failed_samples")
        axes.plot(steps, list(accumulate(counts)), color=color, linewidth=1.6, drawstyle="steps-post")

    return panel("failed samples so far", placed, draw, bottom=0)


def held_out_panel(
    title: str, source: str, figure: str, placed: Sequence[PlacedRun], *, factor: float = 1.0
) -> Panel:
    """A held-out figure of one source at each evaluation, with its confidence interval where it has one."""

    def draw(axes: Axes, color: str, one: PlacedRun) -> None:
        known = [
            (one.before + line["step"], line["sources"][source])
            for line in one.run.evaluations
            if line["sources"].get(source, {}).get(figure) is not None
        ]
        steps = [step for step, _ in known]
        axes.plot(
            steps,
            [factor * row[figure] for _, row in known],
            color=color,
            marker="o",
            markersize=4,
            linewidth=1.6,
        )
        bounded = [(step, row) for step, row in known if f"{figure}_low" in row]
        low, high = ([factor * row[f"{figure}_{end}"] for _, row in bounded] for end in ("low", "high"))
        axes.fill_between([step for step, _ in bounded], low, high, color=color, alpha=0.15, linewidth=0)
        if figure == "accuracy" and known:
            axes.axhline(factor * known[-1][1]["chance"], color=color, linestyle="--", linewidth=1)

    return panel(title, placed, draw, bottom=0)


def panel(title: str, placed: Sequence[PlacedRun], draw: Draw, *, bottom: float | None = None) -> Panel:
    """One set of axes over steps, on which each run is drawn in its color."""
    return {dark: _panel(title, placed, draw, bottom, DARK if dark else LIGHT) for dark in (False, True)}


def _panel(
    title: str, placed: Sequence[PlacedRun], draw: Draw, bottom: float | None, colors: dict[str, str]
) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, layout="constrained")
    axes = figure.subplots()
    figure.set_facecolor(colors["page"])
    axes.set_facecolor(colors["page"])
    axes.tick_params(colors=colors["ink"], labelsize=8, length=0)
    axes.grid(axis="y", color=colors["faint"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.spines["bottom"].set_visible(True)
    axes.spines["bottom"].set_color(colors["faint"])
    axes.set_title(title, loc="left", fontweight="bold", parse_math=False, fontsize=9, color=colors["ink"])
    axes.set_xlabel("step", fontsize=8, color=colors["ink"])
    for number, one in enumerate(placed):
        draw(axes, color_of(number), one)
    if bottom is not None:
        axes.set_ylim(bottom=bottom)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=192, metadata={"Software": None})
    return file.getvalue()


def running_mean(values: Sequence[float], share: float = 0.1) -> list[float]:
    """Mean over a window around each value. Its width is ``share`` of the length, less near both ends.

    >>> running_mean([0.0, 3.0, 6.0, 3.0], share=0.75)
    [0.0, 3.0, 4.0, 3.0]
    """
    reach = int(len(values) * share) // 2
    sums = [0.0, *accumulate(values)]
    smooth = []
    for at in range(len(values)):
        near = min(reach, at, len(values) - 1 - at)
        smooth.append((sums[at + near + 1] - sums[at - near]) / (2 * near + 1))
    return smooth
