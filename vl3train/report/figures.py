"""The figures of the report: small drawings (SVG) over steps, in the colors of the page, light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate

from vl3train.report.lineage import PlacedRun

COLORS = ("#2f81f7", "#e36209", "#2da44e", "#bf3989", "#b08800", "#8250df", "#1b8a94", "#cf222e")
"""Of the runs, in their order; they can be told apart on light and on dark pages."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 370, 240, 46, 12, 30, 36
"""Pixels of a drawing and of its margins: small enough that its words can be read where it fills a phone's width."""
MOST_POINTS = 400
"""Of a line: more than a drawing has columns."""


@dataclass(frozen=True, slots=True)
class Line:
    """Points joined by a line, left to right."""

    color: str
    steps: Sequence[float]
    values: Sequence[float]
    kind: str = "line"  # or "faint", "dashed"; "marked": with a dot at each point
    low: Sequence[float] = ()  # with ``high`` the bounds of a band around it
    high: Sequence[float] = ()


def color_of(number: int) -> str:
    """Of the run with this number."""
    return COLORS[number % len(COLORS)]


def loss_panel(placed: Sequence[PlacedRun]) -> str:
    """Loss of the steps: a faint line of every step, and the running mean on top."""
    lines = []
    for number, one in enumerate(placed):
        steps, losses = one.steps("loss")
        lines.append(Line(color_of(number), steps, losses, "faint"))
        lines.append(Line(color_of(number), steps, running_mean(losses)))
    return panel("training loss per supervised token", lines)


def step_panel(title: str, key: str, placed: Sequence[PlacedRun], *, factor: float = 1.0) -> str:
    """The running mean of a figure of the step log."""
    lines = []
    for number, one in enumerate(placed):
        steps, values = one.steps(key)
        lines.append(Line(color_of(number), steps, running_mean([factor * value for value in values])))
    return panel(title, lines)


def failed_panel(placed: Sequence[PlacedRun]) -> str:
    """Failed samples so far in each run."""
    lines = []
    for number, one in enumerate(placed):
        steps, counts = one.steps("failed_samples")
        lines.append(Line(color_of(number), steps, list(accumulate(counts))))
    return panel("failed samples so far", lines)


def held_out_panel(
    title: str, source: str, figure: str, placed: Sequence[PlacedRun], *, factor: float = 1.0
) -> str:
    """A held-out figure of one source at each evaluation, with its confidence interval where it has one."""
    lines = []
    for number, one in enumerate(placed):
        color = color_of(number)
        steps, rows = one.held_out(source, figure)
        values = [factor * row[figure] for row in rows]
        bounds: list[list[float]] = [[], []]
        if all(f"{figure}_low" in row for row in rows):
            bounds = [[factor * row[f"{figure}_{end}"] for row in rows] for end in ("low", "high")]
        if figure == "accuracy" and rows:
            lines.append(Line(color, steps, [factor * rows[-1]["chance"]] * len(steps), "dashed"))
        lines.append(Line(color, steps, values, "marked", *bounds))
    return panel(title, lines)


def panel(title: str, lines: Sequence[Line]) -> str:
    """A drawing as SVG. The vertical axis begins at 0, or below the lowest value."""
    xs = [step for line in lines for step in line.steps]
    ys = [value for line in lines for value in (*line.values, *line.low, *line.high)]
    left, right = (min(xs), max(xs)) if xs else (0, 1)
    ticks = nice_ticks(min(0.0, *ys) if ys else 0.0, max(ys, default=1.0))
    bottom, top = ticks[0], ticks[-1]

    def x(step: float) -> str:
        share = (step - left) / (right - left) if right > left else 0.5
        return f"{LEFT + share * (WIDTH - LEFT - RIGHT):.1f}"

    def y(value: float) -> str:
        return f"{HEIGHT - BOTTOM - (value - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = [f'<text class="title" x="8" y="18">{escape(title)}</text>']
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{float(y(tick)) + 4:.1f}" text-anchor="end">{tick:,.6g}</text>'
        )
    for tick in dict.fromkeys((left, (left + right) // 2, right)):
        parts.append(f'<text x="{x(tick)}" y="{HEIGHT - 18}" text-anchor="middle">{tick:,.0f}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) // 2}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    for line in lines:
        points = [f"{x(step)},{y(value)}" for step, value in thinned(line.steps, line.values)]
        if line.low:
            there = [f"{x(step)},{y(value)}" for step, value in zip(line.steps, line.high, strict=True)]
            back = [f"{x(step)},{y(value)}" for step, value in zip(line.steps, line.low, strict=True)]
            parts.append(
                f'<polygon class="band" fill="{line.color}" points="{" ".join(there + back[::-1])}"/>'
            )
        parts.append(f'<polyline class="{line.kind}" stroke="{line.color}" points="{" ".join(points)}"/>')
        if line.kind == "marked":
            for point in points:
                across, down = point.split(",")
                parts.append(f'<circle cx="{across}" cy="{down}" r="3" fill="{line.color}"/>')
    label = f'role="img" aria-label="{escape(title)}"'
    return f'<svg class="figure" viewBox="0 0 {WIDTH} {HEIGHT}" {label}>{"".join(parts)}</svg>'


def nice_ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers in equal steps, the first at ``low`` or below, the last at ``high`` or above.

    >>> nice_ticks(0.0, 96.0), nice_ticks(0.0, 0.013), nice_ticks(0.0, 0.0)
    ([0.0, 20.0, 40.0, 60.0, 80.0, 100.0], [0.0, 0.005, 0.01, 0.015], [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    """
    span = (high - low) or 1.0
    unit = 10.0 ** math.floor(math.log10(span))
    step = next(unit * part for part in (0.2, 0.5, 1.0, 2.0, 5.0) if span / (unit * part) <= 5)
    first, last = math.floor(low / step), math.ceil(max(high, low + span) / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 2) + 1)]


def thinned(steps: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    """Up to MOST_POINTS points of a line, its first and last among them."""
    count = len(steps)
    if count <= MOST_POINTS:
        return list(zip(steps, values, strict=True))
    places = sorted({round(at * (count - 1) / (MOST_POINTS - 1)) for at in range(MOST_POINTS)})
    return [(steps[place], values[place]) for place in places]


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
