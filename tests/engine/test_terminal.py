"""Ctrl-C at a real terminal: the kernel sends SIGINT to its foreground processes, the ranks save, one line is left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vl3train.contracts.exit_codes import STOPPED

RANK = """
import os, sys, time
from pathlib import Path
from vl3train.contracts.exit_codes import STOPPED, leave_code
from vl3train.engine.stop import StopRequest

rank, stop = int(os.environ["RANK"]), StopRequest()
Path(sys.argv[1], f"ready {rank}").touch()
while not stop.requested:
    time.sleep(0.01)
time.sleep(1.5 * rank)  # torchrun sees the end of the first, and ends the second, which still saves
if rank == 0:
    print("stopped on request after step 5", flush=True)
leave_code(STOPPED)
os._exit(STOPPED)
"""
"""A rank that does nothing but be asked to stop."""

TAKE_TERMINAL = """
import fcntl, os, signal, sys, termios

# A suite under nohup, or in the background of a script, ignores it, and its children do.
signal.signal(signal.SIGINT, signal.SIG_DFL)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
"""The leader of a new session makes standard input its terminal, and becomes the command."""


@pytest.mark.two_processes
def test_ctrl_c_leaves_one_line_and_the_code_of_a_stop(tmp_path: Path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    ours, terminal = os.openpty()
    words = ["-m", "vl3train.launch", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path)]

    # Not preexec_fn: it makes Python fork, and a fork of a large process is refused where memory is short.
    process = subprocess.Popen(
        [sys.executable, "-c", TAKE_TERMINAL, *words],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    while len(list(tmp_path.glob("ready *"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    os.write(ours, b"\x03")
    said = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # every process that had the terminal has ended
            break
        said += part
    assert process.wait() == STOPPED
    lines = [line for line in said.decode().split("^C", 1)[1].splitlines() if line.strip()]
    assert lines == ["stopped on request after step 5"]
