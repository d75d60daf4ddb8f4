"""The figures of the report, as PNG, for light and for dark pages."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vl3train.report.run_log import Milestone, RunLog

LIGHT = {"page": "#ffffff", "ink": "#24292f", "faint": "#d8dee4", "line": "#1f6feb", "chance": "#bc4c00"}
DARK = {"page": "#161b22", "ink": "#c9d1d9", "faint": "#30363d", "line": "#58a6ff", "chance": "#f0883e"}
COLUMNS = 4


def draw_losses(runs: Sequence[RunLog], *, dark: bool) -> bytes:
    """Loss over steps, one panel for each run: a faint line of every step, and the running mean on top."""
    colors = DARK if dark else LIGHT
    figure, panels = panels_of(len(runs), min(len(runs), COLUMNS), 2.7, colors)
    for i, (panel, run) in enumerate(zip(panels, runs, strict=True)):
        known = [line for line in run.steps if line["loss"] is not None]  # else its step was skipped
        steps = [line["step"] for line in known]
        losses = [line["loss"] for line in known]
        panel.plot(steps, losses, color=colors["line"], alpha=0.3, linewidth=0.9)
        panel.plot(steps, running_mean(losses), color=colors["line"], linewidth=1.9)
        panel.set_title(run.name, loc="left", fontweight="bold", parse_math=False)
        panel.set_xlabel("step")
        panel.set_ylim(bottom=0)
        if i % COLUMNS == 0:
            panel.set_ylabel("loss per supervised token")
    return as_png(figure)


def draw_accuracies(reached: Sequence[Milestone], *, dark: bool) -> bytes:
    """Held-out accuracy over the milestones, one panel for each source, with chance as a dashed line."""
    colors = DARK if dark else LIGHT
    names = list(dict.fromkeys(name for milestone in reached for name in milestone.sources))
    figure, panels = panels_of(len(names), min(len(names), COLUMNS), 2.2, colors)
    ticks = [milestone.name.removeprefix("after ") for milestone in reached]
    for i, (panel, name) in enumerate(zip(panels, names, strict=True)):
        known = [(at, m.sources[name]) for at, m in enumerate(reached) if name in m.sources]
        places = [at for at, _ in known]
        values = [100 * figures["accuracy"] for _, figures in known]
        chance = 100 * known[-1][1]["chance"]
        panel.axhline(chance, color=colors["chance"], linestyle="--", linewidth=1.3)
        panel.plot(places, values, color=colors["line"], marker="o", markersize=4.5, linewidth=1.9)
        panel.annotate(
            f"{values[-1]:.0f} %",
            (places[-1], values[-1]),
            xytext=(0, 7 if values[-1] < 85 else -14),
            textcoords="offset points",
            ha="center",
            fontweight="bold",
            color=colors["ink"],
        )
        panel.set_title(name, loc="left", fontweight="bold", parse_math=False)
        panel.set_ylim(-4, 106)
        panel.set_xlim(-0.35, len(ticks) - 0.65)
        panel.set_xticks(range(len(ticks)), ticks, rotation=35, ha="right", parse_math=False)
        panel.set_yticks([0, 25, 50, 75, 100])
        if i % COLUMNS == 0:
            panel.set_ylabel("accuracy, %")
        if i == 0:
            where = (len(ticks) - 0.7, chance)
            panel.annotate(
                "chance", where, xytext=(0, 3), textcoords="offset points", ha="right", color=colors["chance"]
            )
    return as_png(figure)


def panels_of(count: int, columns: int, height: float, colors: dict[str, str]) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels, ``columns`` in a row, each ``height`` inches high."""
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    figure = Figure(figsize=(max(2.75 * columns, 5), height * rows), layout="constrained")
    figure.set_facecolor(colors["page"])
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    panels = list(grid.flat)
    for spare in panels[count:]:
        spare.set_visible(False)
    for panel in panels:
        panel.set_facecolor(colors["page"])
        panel.tick_params(colors=colors["ink"], labelsize=8, length=0)
        panel.grid(axis="y", color=colors["faint"], linewidth=0.7)
        panel.set_axisbelow(True)
        panel.spines[:].set_visible(False)
        panel.spines["bottom"].set_visible(True)
        panel.spines["bottom"].set_color(colors["faint"])
        for text in (panel.title, panel._left_title, panel.xaxis.label, panel.yaxis.label):
            text.set_color(colors["ink"])
            text.set_fontsize(9)
    return figure, panels[:count]


def running_mean(values: Sequence[float], share: float = 0.1) -> list[float]:
    """Mean over a window around each value. Its width is ``share`` of the length, less near both ends.

    >>> running_mean([0.0, 3.0, 6.0, 3.0], share=0.75)
    [0.0, 3.0, 4.0, 3.0]
    """
    reach = int(len(values) * share) // 2
    smooth = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        window = values[i - near : i + near + 1]
        smooth.append(sum(window) / len(window))
    return smooth


def as_png(figure: Figure) -> bytes:
    """The figure as PNG; equal figures give equal bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=144, metadata={"Software": None})
    return file.getvalue()
