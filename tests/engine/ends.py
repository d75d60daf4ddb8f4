"""Jobs of two ranks in which something is raised, and whether each of them ends as it should."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from tests.engine.jobs import kill_job, start_job, wait_until_gone
from tests.engine.planted import PLANTED_AT

SECONDS = 60
"""In which all processes of a job are gone after one of them failed."""

LONGEST_SECONDS = 400
"""In which a job ends on a machine that does other work too."""

ENDS = [
    # planted, rank, what the console says at its end
    ("error@join", 1, "IndexError: planted here"),
    ("error@lock", 0, "IndexError: planted here"),
    ("error@index", 0, "IndexError: planted here"),
    ("error@data", 1, "IndexError: planted here"),
    ("error@engine", 1, "IndexError: planted here"),
    ("error@decode_server", 1, "the decode server did not start"),
    ("error@decode", 0, "IndexError: planted here"),
    ("error@worker", 0, "IndexError: planted here"),
    ("error@collate", 1, "IndexError: planted here"),
    ("kill@worker", 0, "DataLoader worker (pid"),
    ("memory@step", 0, "MemoryError"),
    ("recursion@step", 1, "RecursionError"),
    ("exit@step", 1, "SystemExit: 0"),
    ("kill@step", 1, "Signal 9 (SIGKILL)"),
    ("error@log", 1, "IndexError: planted here"),
    ("error@console", 0, "IndexError: planted here"),
    ("error@save", 1, "IndexError: planted here"),
    ("error@gather_evaluation", 1, "IndexError: planted here"),
    ("error@model", 0, "IndexError: planted here"),
]
"""At every part of a run, on either rank. With ``RESUMED`` these are the suite's."""

MORE_ENDS = [
    ("error@write_config", 0, "IndexError: planted here"),
    ("error@truncate_metrics", 0, "IndexError: planted here"),
    ("error@tracker", 1, "IndexError: planted here"),
    ("error@loader_start", 1, "IndexError: planted here"),
    ("error@decode_start", 0, "IndexError: planted here"),
    ("error@ledger", 0, "IndexError: planted here"),
    ("error@tracker_log", 1, "IndexError: planted here"),
    ("error@digests", 0, "IndexError: planted here"),
    ("error@latest", 0, "IndexError: planted here"),
    ("error@evaluation", 1, "IndexError: planted here"),
    ("error@mark_finished", 0, "IndexError: planted here"),
]
"""Further ones, for benchmarks/reliability.py."""

RESUMED = [
    ("error@find", 1, "IndexError: planted here"),
]
"""In a run that has a checkpoint."""

LOADED = ("error@load", 1, "IndexError: planted here")
"""In a run that has a checkpoint of two ranks."""

RUN = [
    *("stage=1", "run.num_steps=4", "run.evaluate_steps=2", "run.evaluate_at_end=false"),
]
"""Options of a run that comes by every place where something is planted."""


def problem_of_end(
    python: list[str],
    end: tuple[str, int, str],
    words: list[str],
    folder: Path,
    launcher: str = "vl3train.launch",
) -> str | None:
    """Run one job in ``folder / "run"``; what is wrong with how it ended, None where nothing is."""
    planted, rank, cause = end
    folder.mkdir(exist_ok=True)
    log, mark = folder / "log", folder / "planted"
    with log.open("w") as file:
        process, job = start_job(
            python,
            "tests.engine.planted",
            [planted, str(rank), *words, f"run.output_dir={folder / 'run'}"],
            launcher=launcher,
            environment={PLANTED_AT: str(mark)},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait(timeout=LONGEST_SECONDS)
        except subprocess.TimeoutExpired:
            kill_job(job)
            return f"{planted} on rank {rank}: it hangs: {log.read_text()[-3000:]}"
    said = log.read_text()
    if not mark.exists():
        return f"{planted} on rank {rank}: the run did not come there: {said[-3000:]}"
    left = wait_until_gone(job, mark.stat().st_mtime + SECONDS - time.time())
    kill_job(job)
    if left:
        return f"{planted} on rank {rank}: {SECONDS} s later there are still {left}"
    if code == 0:
        return f"{planted} on rank {rank}: exit code 0: {said[-3000:]}"
    if cause not in said[max(said.rfind("Root Cause"), 0) :] or "Root Cause" not in said:
        return f"{planted} on rank {rank}: the console does not end with {cause!r}: {said[-3000:]}"
    return None
