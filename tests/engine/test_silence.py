"""A run that stands still says who stands still, and where; and who died."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.engine.jobs import processes_of, start_job
from tests.engine.runs import run
from tests.engine.small_demo import small_demo_words

PATIENCE = 120


@pytest.mark.two_processes
def test_what_stands_still_is_named_and_a_killed_rank_is_told_with_its_phase(
    warm_python, demo_root, tmp_path
):
    """One job: a rank is stopped, then a loader worker, then a shard's storage blocks, then a rank is killed."""
    data = shutil.copytree(demo_root, tmp_path / "data")
    words = [*small_demo_words(data, num_workers=1), "stage=1", "run.evaluate_at_end=false"]
    words += ["run.silence_seconds=2", "run.start_silence_seconds=600", "step.global_packs=4"]
    run([*words, f"run.output_dir={tmp_path / 'indexed'}", "run.num_steps=1", "data.num_workers=0"])
    words += [f"run.output_dir={tmp_path / 'out'}", "run.num_steps=100000", "run.save_steps=1000000"]
    with (tmp_path / "log").open("w") as log:
        process, job = start_job(warm_python, "vl3train.train", words, stdout=log, stderr=log)
    try:
        metrics = tmp_path / "out" / "metrics.jsonl"
        wait_for(process, lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2)
        records = {path.name: path for path in job_records(job)}
        rank_1, worker_0 = (
            pid_of(records["rank-1"]),
            int(next(name for name in records if name.startswith("rank-0.worker-0-")).rpartition("-")[2]),
        )
        for pid, name in ((rank_1, "rank 1"), (worker_0, "loader worker 0 of rank 0")):
            os.kill(pid, signal.SIGSTOP)
            told = re.compile(rf"{name} \(process {pid} on \S+ stopped by a signal.*")
            wait_for(process, lambda told=told: told.search((tmp_path / "log").read_text()))
            os.kill(pid, signal.SIGCONT)
            done = len(metrics.read_text().splitlines())
            wait_for(process, lambda done=done: len(metrics.read_text().splitlines()) > done + 2)
        shard, fifo, kept = data / "captions/shard-000000.tar", tmp_path / "fifo", tmp_path / "kept"
        os.mkfifo(fifo)  # to open it blocks for ever
        os.link(shard, kept)
        os.rename(fifo, shard)
        told = re.compile(rf"loader worker 0 of rank \d .*: reading \S+ \({shard}, bytes \d+ to \d+\), for")
        wait_for(process, lambda: told.search((tmp_path / "log").read_text()))
        os.rename(kept, shard)
        done = len(metrics.read_text().splitlines())
        wait_for(process, lambda: len(metrics.read_text().splitlines()) > done + 2)
        os.kill(rank_1, signal.SIGKILL)
        killed = time.monotonic()
        assert process.wait(timeout=PATIENCE) != 0
        assert time.monotonic() - killed < 60
    finally:
        for pid in processes_of(job):
            os.kill(pid, signal.SIGKILL)
    log = (tmp_path / "log").read_text()
    assert re.search(
        r"rank 1 \(process .* stopped by a signal, does not answer\): .*step \d+, for \d+ s", log
    )
    gone = rf"^rank 1 \(process {rank_1}\) has ended before; it was in .*step \d+"
    assert re.search(gone, log, re.MULTILINE), log[-3000:]
    reports = list((tmp_path / "out" / "silence").iterdir())
    assert any("MainThread (innermost call last):" in report.read_text() for report in reports)


def wait_for(process: subprocess.Popen, holds):
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def job_records(job):
    """The records' files of a job, as one of its processes has them mapped."""
    for pid in processes_of(job):
        with open(f"/proc/{pid}/maps") as maps:
            if found := re.search(r"(/\S+)/rank-\d", maps.read()):
                return sorted(Path(found[1]).glob("rank-*"))
    raise AssertionError("no records")


def pid_of(record):
    return int.from_bytes(record.read_bytes()[:8], "little")
