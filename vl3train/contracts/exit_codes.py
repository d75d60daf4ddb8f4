"""The signals that end a run, what its exit code says, and how each rank tells the launcher its own."""

from __future__ import annotations

import os
import signal
from pathlib import Path

STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP})
"""Of queues before SIGKILL, of Ctrl-C, of Slurm's ``--signal``, of a terminal that is closed."""

FINISHED = 0
FAILED = 1
STOPPED = 75
"""The run was asked to stop, has saved, and goes on when it is started again: EX_TEMPFAIL of sysexits.h."""
INTERRUPTED = 130
"""Ctrl-C before the first step or a second time: 128 + SIGINT, as shells count it. Nothing was saved."""

CODES_FOLDER = "VL3TRAIN_EXIT_CODES"
"""Environment variable that the launcher sets: a folder with a file for each rank of this node that has ended,
named by its number on the node and its code, and with the records of contracts/progress."""


def leave_code(code: int) -> None:
    """Leave this rank's exit code for the launcher, where there is one of ours.

    In the name of a file that is empty: a full disk still takes that.
    """
    if folder := os.environ.get(CODES_FOLDER):
        for earlier in _codes_of_this_rank(folder):
            earlier.unlink()
        (Path(folder) / f"{os.environ.get('LOCAL_RANK', '0')}.{code}").touch()


def codes_in(folder: Path) -> set[int]:
    """The exit codes that the ranks of this node have left."""
    return {int(file.suffix[1:]) for file in folder.glob("[0-9]*.*")}


def left_code() -> int | None:
    """The code that this rank has left in this launch: torchrun's ``--max-restarts`` starts it anew after all but 0."""
    if folder := os.environ.get(CODES_FOLDER):
        return next((int(file.suffix[1:]) for file in _codes_of_this_rank(folder)), None)
    return None


def _codes_of_this_rank(folder: str) -> list[Path]:
    return list(Path(folder).glob(f"{os.environ.get('LOCAL_RANK', '0')}.*"))


def code_of_run(codes: set[int], *, was_asked_to_stop: bool) -> int:
    """The launcher's code where its ranks did not all end with 0.

    Args:
        codes: what the ranks of this node left. A rank that a signal ended before its first step has left none, and had
            nothing to save.
        was_asked_to_stop: whether the launcher got a signal.

    >>> code_of_run({75}, was_asked_to_stop=False), code_of_run(set(), was_asked_to_stop=True)
    (75, 75)
    >>> code_of_run({75, 1}, was_asked_to_stop=True), code_of_run(set(), was_asked_to_stop=False)
    (1, 1)
    >>> code_of_run({130, 1}, was_asked_to_stop=True)  # it lost the connection before it heard the signal
    130
    """
    if codes == {STOPPED} or (not codes and was_asked_to_stop):
        return STOPPED
    if INTERRUPTED in codes:
        return INTERRUPTED
    return FAILED
