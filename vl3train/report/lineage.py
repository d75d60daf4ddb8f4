"""Which runs follow each other and which are alternatives: where each begins on an axis of steps that all share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl3train.report.run_log import RunLog

CHECKPOINT = re.compile(r"step_(\d+)")


@dataclass(frozen=True, slots=True)
class PlacedRun:
    """A run with the steps that were done before it, in the runs that it goes back to."""

    run: RunLog
    before: int
    parent: RunLog | None  # the run that it started from, where the report has it
    start: Mapping[str, Mapping[str, Any]] | None = (
        None  # that one's held-out figures of each source at this step
    )

    def steps(self, key: str) -> tuple[list[int], list[float]]:
        """Steps done so far, and a figure of the log after each; steps without it are left out."""
        known = [line for line in self.run.steps if line.get(key) is not None]
        return [self.before + line["step"] for line in known], [line[key] for line in known]

    def held_out(self, source: str, figure: str) -> tuple[list[int], list[Mapping[str, Any]]]:
        """Steps done at each evaluation, its start's in the run before included, and the source's figures then."""
        found = [] if self.start is None else [(self.before, self.start)]
        found += [(self.before + line["step"], line["sources"]) for line in self.run.evaluations]
        known = [(step, sources[source]) for step, sources in found if figure in sources.get(source, {})]
        return [step for step, _ in known], [row for _, row in known]


def place_runs(runs: Sequence[RunLog]) -> list[PlacedRun]:
    """Each run behind the one that it started from; runs of the same start begin at the same step."""
    by_folder = {run.folder.resolve(): run for run in runs if run.folder is not None}
    placed: dict[int, PlacedRun] = {}

    def place(run: RunLog, children: tuple[RunLog, ...]) -> PlacedRun:
        if id(run) not in placed:
            parent, step = parent_of(run, by_folder)
            if parent is None or any(parent is child for child in (*children, run)):
                placed[id(run)] = PlacedRun(run, 0, None)
            else:
                before = place(parent, (*children, run)).before
                start = [line["sources"] for line in parent.evaluations if line["step"] == step]
                placed[id(run)] = PlacedRun(run, before + step, parent, start[-1] if start else None)
        return placed[id(run)]

    return [place(run, ()) for run in runs]


def parent_of(run: RunLog, by_folder: dict[Path, RunLog]) -> tuple[RunLog | None, int]:
    """The run of ``by_folder`` that it started from, and how many steps that one had done."""
    if run.init_from is None:
        return None, 0
    for folder in (run.init_from, *run.init_from.parents):
        if (parent := _run_at(folder, by_folder)) is not None:
            inside = run.init_from.relative_to(folder).parts
            named = [found for part in inside if (found := CHECKPOINT.fullmatch(part))]
            return parent, int(named[0][1]) if named else parent.steps[-1]["step"]
    return None, 0


def _run_at(folder: Path, by_folder: dict[Path, RunLog]) -> RunLog | None:
    """The run of a folder. A relative path may start from another working folder than this one."""
    if folder.is_absolute() or not folder.parts:
        return by_folder.get(folder.resolve()) if folder.parts else None
    ends = [run for path, run in by_folder.items() if path.parts[-len(folder.parts) :] == folder.parts]
    return by_folder.get(folder.resolve()) or (ends[0] if len(ends) == 1 else None)
