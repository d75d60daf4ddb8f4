"""Jobs of a few ranks under torchrun, and all of their processes, found by a mark that each inherits."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.warm_python import JOB

ROOT = Path(__file__).parents[2]


def start_job(
    python: list[str],
    module: str,
    words: list[str],
    *,
    num_ranks: int = 2,
    launcher: str = "torch.distributed.run",
    environment: Mapping[str, str] | None = None,
    **settings: Any,
) -> tuple[subprocess.Popen[str], str]:
    """A launcher with ``num_ranks`` ranks of ``module``, in a session of its own; its process and the job's mark.

    Args:
        python: how Python is called: ``[sys.executable]``, or ``warm_python`` of tests/conftest.py.
    """
    job = f"job-{uuid.uuid4().hex}"
    command = [*python, "-m", launcher, "--standalone", "--nproc-per-node", str(num_ranks)]
    process = subprocess.Popen(
        [*command, "-m", module, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", JOB: job, **(environment or {})},
        start_new_session=True,
        text=True,
        **settings,
    )
    return process, job


def processes_of(job: str) -> dict[int, str]:
    """Command lines of the job's live processes, by process id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if job.encode() in (folder / "environ").read_bytes():
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                found[int(folder.name)] = words
        except OSError:
            continue  # it ended, or is no longer there to read
    return {pid: words for pid, words in found.items() if words}


def wait_for_launcher(process: subprocess.Popen[str], job: str) -> int:
    """The process that started the ranks of a job, as soon as a rank has begun: not one of the warm Python's."""
    rank = wait_for_rank(process, job)
    return int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])


def wait_for_rank(process: subprocess.Popen[str], job: str, rank: str = "?") -> int:
    """The process of a rank, as soon as it has begun; ``?``: of any."""
    while process.poll() is None:
        for pid in processes_of(job):
            try:
                maps = Path(f"/proc/{pid}/maps").read_text()
            except OSError:
                continue  # it has just ended
            if found := re.search(r"(/\S+)/rank-\d", maps):  # their records, which a rank keeps in memory
                for record in Path(found[1]).glob(f"rank-{rank}"):
                    return int.from_bytes(record.read_bytes()[:8], "little")
        time.sleep(0.1)
    raise AssertionError(f"the job has ended with {process.returncode}")


def wait_until_gone(job: str, seconds: float) -> dict[int, str]:
    """The processes of the job that are still there after this time: none, as soon as all have ended."""
    deadline = time.monotonic() + seconds
    while left := processes_of(job):
        if time.monotonic() > deadline:
            return left
        time.sleep(0.1)
    return {}


def kill_job(job: str) -> None:
    """As a machine that loses its power: every process at once. torchrun starts each rank in a session of its own,
    so a signal to torchrun's group does not reach them."""
    while alive := processes_of(job):
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
