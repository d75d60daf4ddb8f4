"""The plan as a picture: lengths of samples, fill and balance of steps."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from vl3train.preview.plan_figures import PlanFigures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"text": "#57606a", "image": "#1f6feb", "video": "#bc4c00", "mixed": "#8250df"}
BINS = 40


def draw_plan(figures: PlanFigures, *, title: str, max_tokens: int, max_patches: int) -> bytes:
    """A PNG of four panels: tokens and patches of a sample, fill and balance of the steps counted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.4), dpi=110, layout="constrained")
    panels = figure.subplots(2, 2)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    _lengths(panels[0, 0], figures.lengths, max_tokens, "tokens of a sample")
    _lengths(panels[0, 1], figures.patches, max_patches, "encoder patches of a sample")
    for values, label, color in (
        (figures.token_fill, "tokens", COLORS["image"]),
        (figures.patch_fill, "patches", COLORS["video"]),
    ):
        panels[1, 0].hist(values, np.linspace(0, 1, BINS).tolist(), color=color, alpha=0.7, label=label)
    panels[1, 0].set_xlabel("fill of the packs")
    panels[1, 0].legend(frameon=False)
    top = max(1.05, float(figures.balance.max()), float(figures.rank_balance.max()))
    for values, label, color in (
        (figures.balance, "packs", COLORS["image"]),
        (figures.rank_balance, "ranks", COLORS["text"]),
    ):
        panels[1, 1].hist(values, np.linspace(1, top, BINS).tolist(), color=color, alpha=0.7, label=label)
    panels[1, 1].axvline(1.02, color="#cf222e", linewidth=1, linestyle="--")
    panels[1, 1].set_xlabel("work of the costliest / mean (1 is balanced)")
    panels[1, 1].legend(frameon=False)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
    for panel, what in zip(panels.flat, ("samples", "samples", "steps", "steps"), strict=True):
        panel.set_ylabel(what)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _lengths(panel: Axes, lengths: dict[str, np.ndarray], cap: int, label: str) -> None:
    if lengths:
        low = max(1, min(int(values.min()) for values in lengths.values()))
        high = max(cap, *(int(values.max()) for values in lengths.values()))
        names, edges = list(lengths), np.geomspace(low, high * 1.001, BINS)
        counts = [np.histogram(np.maximum(lengths[name], 1), edges)[0] for name in names]
        panel.hist(  # of counts: matplotlib takes seconds for a million values
            [edges[:-1]] * len(names),
            edges.tolist(),
            weights=counts,
            stacked=True,
            color=[COLORS[name] for name in names],
            label=names,
        )
        panel.legend(frameon=False)
    panel.axvline(cap, color="#cf222e", linewidth=1, linestyle="--")
    panel.set_xscale("log")
    panel.set_xlabel(f"{label} (dashed: a pack)")


def bars(lengths: np.ndarray, *, width: int) -> list[tuple[str, int, str]]:
    """A histogram for the terminal over powers of two: range, samples, bar.

    >>> bars(np.array([3, 5, 6, 6, 30]), width=4)
    [('2-3', 1, '█▍'), ('4-7', 3, '████'), ('8-15', 0, ''), ('16-31', 1, '█▍')]
    """
    powers = np.floor(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(powers - powers.min()).tolist()
    eighths = " ▏▎▍▌▋▊▉"
    rows = []
    for i, count in enumerate(counts, start=int(powers.min())):
        whole, part = divmod(round(8 * width * count / max(counts)), 8)
        rows.append((f"{2**i}-{2 ** (i + 1) - 1}", count, ("█" * whole + eighths[part]).strip()))
    return rows
