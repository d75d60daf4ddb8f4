"""The report of runs as a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vl3train.config.paths import short_names
from vl3train.report.run_log import RunLog

FILE = "report.html"


def make_report(runs: Sequence[RunLog], out: Path, samples: Sequence[dict[str, Any]]) -> Path:
    """Write report.html, in place of an earlier one; its path.

    Args:
        runs: those that started from another one of them are drawn behind it, others over each other.
        out: folder to write to.
        samples: answers to show, as ``run_log.read_samples`` returns them.

    Raises:
        ValueError: a run is given twice, or a file of predictions is damaged.
    """
    from vl3train.report.lineage import place_runs
    from vl3train.report.page import report_page

    names = short_names([run.folder or Path(run.name) for run in runs])
    named = [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    page = report_page(place_runs(named), samples)
    out.mkdir(parents=True, exist_ok=True)
    (out / FILE).write_text(page, encoding="utf-8")
    return out / FILE
