"""A sweep: check all of its runs, then train one after the other, then say what they reached."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vl3train.config.input.sweeps import Point, point_names, short_keys
from vl3train.config.paths import is_finished
from vl3train.config.problems import ConfigError, Problem, counted
from vl3train.config.schema import TrainConfig
from vl3train.contracts.exit_codes import FAILED, FINISHED, INTERRUPTED, STOPPED
from vl3train.sweeps.results import Result, best_of, result_of, rows_of, write_results


@dataclass(frozen=True, slots=True, kw_only=True)
class SweptRun:
    """One run of a sweep, whose options are checked."""

    words: tuple[str, ...]  # all of its options, its folder among them
    values: dict[str, str]  # of the options that differ
    cfg: TrainConfig

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.cfg.run.output_dir)


def swept_runs(points: Sequence[Point], check: Callable[[list[str]], TrainConfig]) -> list[SweptRun]:
    """The runs of a sweep, each in a folder of its own, named by what differs, below the run.output_dir that it has.

    ``check`` gives the config of some words. Raises ConfigError with the problems of all runs.
    """
    if any(key == "run.output_dir" for key, _ in points[0].differing):
        way_out = "give one: each run gets a folder below it, named by what differs"
        raise ConfigError([Problem("run.output_dir", "several values", "runs of a sweep share it", way_out)])
    keys = short_keys(list(dict.fromkeys(key for point in points for key, _ in point.differing)))
    runs: list[SweptRun] = []
    found: dict[str, Problem] = {}
    for point, name in zip(points, point_names(points), strict=True):
        try:
            base = check(list(point.overrides)).run.output_dir
            words = [*point.overrides, f"run.output_dir={_quoted(os.path.join(base, name))}"]
            values = {keys[key]: value for key, value in point.differing}
            runs.append(SweptRun(words=tuple(words), values=values, cfg=check(words)))
        except ConfigError as error:
            found |= {str(problem): problem for problem in error.problems}
    if found:
        raise ConfigError(list(found.values()))
    return runs


def run_sweep(runs: Sequence[SweptRun], train: Callable[[SweptRun], int], tell: Callable[[str], None]) -> int:
    """Train the runs that are not finished, in order, and show the table of all.

    A run that fails does not end the others. One that was asked to stop ends the sweep; given again, it goes on there.

    Args:
        runs: of the sweep.
        train: trains one; gives the launcher's exit code.
        tell: takes lines for the person.

    Returns:
        0 where all are finished, 75 or 130 where the sweep was stopped, else 1.
    """
    results: list[Result] = []
    code = FINISHED
    for number, run in enumerate(runs, start=1):
        name = f"run {number} of {len(runs)}: {run.folder.name}"
        if own_end := _finished(run):
            tell(f"{name}: {own_end}")
            outcome = "finished"
        elif code in (STOPPED, INTERRUPTED):
            outcome = "not started"
        else:
            tell(f"{name}: begins in {run.folder}")
            own = train(run)
            outcome = {FINISHED: "finished", STOPPED: "stopped"}.get(own, f"failed (exit code {own})")
            code = own if own in (STOPPED, INTERRUPTED) else max(code, min(own, FAILED))
        results.append(result_of(run.folder, run.values, outcome, run.cfg.run.best_figure))
        write_results(_shared_folder(runs), results)
    show_results(results)
    if (best := best_of(results, runs[0].cfg.run.best_figure)) is not None:
        tell(f"best: {best.name}, held-out loss {best.held_out_loss:.4f} after step {best.step}")
    tell(f"results: {write_results(_shared_folder(runs), results)}")
    if failed := [one.name for one in results if one.outcome.startswith("failed")]:
        tell(
            f"{counted(len(failed), 'run')} failed: {', '.join(failed)}; given again, the sweep tries them again"
        )
    return code


def _finished(run: SweptRun) -> str:
    """How a run that has nothing left to do ended; empty for any other. One whose mark is damaged says so itself."""
    try:
        return "finished before" if is_finished(run.cfg) else ""
    except ConfigError:
        return ""


def show_results(results: Sequence[Result]) -> None:
    """Print the table."""
    rows = rows_of(results)
    table = Table(title=counted(len(rows), "run"), title_justify="left", title_style="bold")
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    console = Console(highlight=False)
    console.print(table)
    console.file.flush()


def _shared_folder(runs: Sequence[SweptRun]) -> Path:
    """The folder that all runs lie below."""
    return Path(os.path.commonpath([run.folder.absolute().parent for run in runs]))


def _quoted(value: str) -> str:
    """A path as a value of the command line: with a comma or ``=`` Hydra would not take it as text."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
