"""The training as a job of its own, as `vl3train train` starts it; signals to this process go to it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence

from vl3train.contracts.exit_codes import FAILED

PYTHON = [sys.executable]
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def train(words: Sequence[str], ranks: int) -> int:
    """Train with these options on so many ranks; the launcher's exit code (contracts/exit_codes.py).

    A Ctrl-C is for the job: it saves, and this process goes on when it has.
    """
    launcher = ["-m", "vl3train.launch", "--standalone", "--nproc-per-node", str(ranks)]
    # In a group of its own the job gets each signal once: from here, not from the terminal too.
    job = subprocess.Popen([*PYTHON, *launcher, "-m", "vl3train.train", *words], process_group=0)
    before = {
        number: signal.signal(number, lambda number, _: job.send_signal(number)) for number in PASSED_ON
    }
    try:
        code = job.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else FAILED
