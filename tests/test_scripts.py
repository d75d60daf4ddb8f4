"""What the launch scripts do when a run is stopped. No Slurm is here: srun and scontrol are stand-ins."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

STAND_INS = {
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\n"$@" &\necho $! > task.pid\nwait $!',
    "scontrol": 'case "$1" in show) echo first; echo second ;; *) echo "$@" >> scontrol.log ;; esac',
    # a launcher that ends at once, or after a signal with a save in between
    "python": 'echo "$@" > words\n[ "$WAIT" = 1 ] || exit $CODE\n'
    "trap 'sleep 0.3; exit 75' TERM USR1\ntouch ready\nwhile :; do sleep 0.05; done",
}


@pytest.fixture
def slurm(tmp_path):
    """Starts the script in a folder of its own; as the job's only node does."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def start(**environment):
        return subprocess.Popen(
            ["bash", ROOT / "scripts" / "launch_slurm.sh", "stage=2", "model=2b"],
            cwd=tmp_path,
            env={
                **os.environ,
                **{"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[1-2]"},
                **{"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"},
                **environment,
            },
        )

    return start


def requeued(folder):
    log = folder / "scontrol.log"
    return log.read_text() if log.exists() else ""


@pytest.mark.parametrize(("code", "ends_with", "queue"), [(0, 0, ""), (75, 0, "requeue 7\n"), (1, 1, "")])
def test_only_a_stopped_run_is_put_into_the_queue_again(slurm, tmp_path, code, ends_with, queue):
    assert slurm(WAIT="0", CODE=str(code)).wait(timeout=30) == ends_with
    assert requeued(tmp_path) == queue
    words = (tmp_path / "words").read_text().split()
    assert words[:2] == ["-m", "vl3train.launch"]
    assert words[-2:] == ["stage=2", "model=2b"]
    assert "first:20007" in words, "the first node is the meeting point"
    assert not list(tmp_path.glob(".vl3train-stopped*"))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_the_shell_of_a_task_outlives_the_signal_and_waits_for_the_save(slurm, tmp_path, number):
    process = slurm(WAIT="1")
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    task = int((tmp_path / "task.pid").read_text())
    launcher = int(subprocess.check_output(["pgrep", "-P", str(task)]).split()[0])
    for pid in (task, launcher):  # Slurm signals every process of the step
        os.kill(pid, number)
    assert process.wait(timeout=30) == 0
    assert requeued(tmp_path) == "requeue 7\n"


def test_a_stage_that_was_stopped_is_not_taken_for_a_finished_one(tmp_path):
    launcher = tmp_path / "stopped"
    launcher.write_text("#!/bin/sh\nexit 75\n")
    launcher.chmod(0o755)
    checker = tmp_path / "python"  # the checks of four stages, which have their own tests
    checker.write_text("#!/bin/sh\nexit 0\n")
    checker.chmod(0o755)
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "train_all_stages.sh", "--nproc", "2", "--machine", "cpu"],
        env={**os.environ, "LAUNCH": str(launcher), "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 75
    assert "stage 1 was asked to stop and has saved: the same command goes on from there" in done.stderr
    assert "stage 2 of 4" not in done.stdout
