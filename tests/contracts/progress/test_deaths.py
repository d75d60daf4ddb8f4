"""Of several ranks that ended, the one is told that died first, with what it did."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.contracts.progress.test_record import child_with_record
from vl3train.contracts.progress.deaths import Ended, describe_deaths


def test_a_killed_rank_is_told_before_one_that_lost_its_connection(tmp_path):
    pid = child_with_record(tmp_path / "rank-1")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    ended = {
        0: Ended(exit_code=1, when=100),
        1: Ended(exit_code=-9, when=101),
        2: Ended(exit_code=-15, when=101),  # by torchrun
        3: Ended(exit_code=-9, when=131),  # by torchrun, which waited 30 s
    }
    (line,) = describe_deaths(ended, tmp_path)
    assert line.startswith("rank 1 was killed by SIGKILL")
    assert "it was in forward of micro-batch 2, step 7; samples of the step: a/0/cat, a/0/dog" in line
    assert describe_deaths({0: Ended(exit_code=1, when=100), 2: ended[2]}, tmp_path) == [
        "rank 0 ended with exit code 1 before it began"
    ]


SCRIPT = """
import os, signal, time
from vl3train.contracts.exit_codes import leave_code
from vl3train.contracts.progress.job import keep_record_of_rank
from vl3train.contracts.progress.record import progress

signal.signal(signal.SIGTERM, lambda *_: None)
keep_record_of_rank()
progress.phase("backward", step=3, micro_batch=1)
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(1)  # as a rank that loses its connection
leave_code(1)
os._exit(1)
"""


@pytest.mark.two_processes
def test_the_launcher_closes_with_the_rank_that_died_and_its_phase(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "vl3train.launch",
            "--standalone",
            "--nproc-per-node",
            "2",
            tmp_path / "script.py",
        ],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "rank 1 was killed by SIGKILL" in done.stderr
    assert "it was in backward of micro-batch 1, step 3" in done.stderr
