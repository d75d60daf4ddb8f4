"""The report of runs as files: figures and one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vl3train.report.run_log import RunLog, milestones


def make_report(runs: Sequence[RunLog], out: Path, samples: Sequence[dict[str, Any]]) -> list[str]:
    """Write loss_curves.png, accuracy.png where a run was evaluated, and report.html; their names.

    Args:
        runs: in the order of training.
        out: folder to write to; an earlier report in it is replaced.
        samples: answers to show, as ``run_log.read_samples`` returns them.
    """
    from vl3train.report.figures import draw_accuracies, draw_losses
    from vl3train.report.page import write_page

    runs = list(runs)
    out.mkdir(parents=True, exist_ok=True)
    reached = milestones(runs)
    figures = {"loss_curves": {dark: draw_losses(runs, dark=dark) for dark in (False, True)}}
    if reached:
        figures["accuracy"] = {dark: draw_accuracies(reached, dark=dark) for dark in (False, True)}
    for name, of_theme in figures.items():
        (out / f"{name}.png").write_bytes(of_theme[False])
    write_page(out / "report.html", runs, reached, figures, list(samples))
    return [*(f"{name}.png" for name in figures), "report.html"]
