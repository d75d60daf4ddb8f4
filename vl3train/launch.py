"""torchrun for queues: ``python -m vl3train.launch --nproc-per-node 8 -m vl3train.train stage=2 model=2b ...``.

It takes torchrun's own options and starts the ranks as torchrun does. After a signal it lets them save, however long
that takes: torchrun kills after 30 s, and dies of SIGUSR1 while its ranks train on. And its exit code says how the run
ended (contracts/exit_codes.py): 0 it is finished, 75 it was asked to stop and has saved, else it failed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from vl3train.contracts.exit_codes import (
    CODES_FOLDER,
    FAILED,
    FINISHED,
    STOPPED,
    code_of_run,
    codes_in,
)
from vl3train.contracts.progress.deaths import Ended, describe_deaths

SECONDS_TO_END = 3.0
"""For the workers of a job whose ranks have ended. They take milliseconds."""
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class NothingStarted(BaseException):
    """A signal came while no rank of this node was there yet: it waits for other nodes, which may never come."""


def main(arguments: list[str] | None = None) -> int:
    """Run torchrun; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="vl3train-") as folder:
        was_asked_to_stop = pass_signals_on(Path(folder))
        os.environ[CODES_FOLDER] = folder
        hide_stops(Path(folder))
        try:
            # torchrun handles only what it must: at a signal it would count 30 s, and then kill.
            torchrun(["--signals-to-handle", "SIGQUIT", *words])
        except NothingStarted:
            print("stopped on request before a rank was started", file=sys.stderr)
            return STOPPED
        except ChildFailedError as error:
            code = code_of_run(codes_in(Path(folder)), was_asked_to_stop=was_asked_to_stop())
            if code == FAILED:
                print(error, file=sys.stderr)  # torchrun's table: which rank failed first, and why
                ended = {
                    rank: Ended(exit_code=failure.exitcode, when=failure.timestamp)
                    for rank, failure in error.failures.items()
                }
                print(*describe_deaths(ended, Path(folder)), sep="\n", file=sys.stderr)
            return code
        finally:
            end_left(Path(folder))
    return FINISHED


def end_left(folder: Path) -> None:
    """Kill what is left of the job on this node after its ranks have ended. Their workers end by themselves, at once,
    unless they are stopped (SIGSTOP, a debugger) and hear nothing."""
    deadline = time.monotonic() + SECONDS_TO_END
    while left := processes_of(folder):
        if time.monotonic() > deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.1)


def processes_of(folder: Path) -> list[int]:
    """The live processes that were started with this launch's CODES_FOLDER, or keep a record there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            texts = [(process / name).read_bytes() for name in ("environ", "maps")]
        except OSError:
            continue  # it has just ended, or is another user's
        if int(process.name) != os.getpid() and any(os.fsencode(folder) in text for text in texts):
            found.append(int(process.name))
    return found


def hide_stops(folder: Path) -> None:
    """From now on keep torchrun's log from calling a stop a failure, and from saying that it ends the other ranks.

    torchrun takes each code but 0 for a failure: "failed (exitcode: 75)" would be the last thing a stopped run says.
    """

    def says_something(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        ends_others = "closing signal" in text and STOPPED in codes_in(folder)
        return not ends_others and f"(exitcode: {STOPPED})" not in text

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(says_something)


def pass_signals_on(folder: Path) -> Callable[[], bool]:
    """From now on send the signals that queues and people send to the ranks; tells whether there was one.

    Where no rank was started yet, which would leave its code in ``folder``, a signal raises NothingStarted.
    """
    heard = []

    def pass_on(number: int, _: object) -> None:
        heard.append(number)
        below = children(os.getpid())
        if not any(map(leads_a_session, below)) and not codes_in(folder):
            raise NothingStarted
        for child in below:
            try:
                os.kill(child, number)
            except ProcessLookupError:
                continue  # it has just ended

    for name in PASSED_ON:
        if signal.getsignal(name) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(name, pass_on)
    return lambda: bool(heard)


def leads_a_session(pid: int) -> bool:
    """Whether a process is a rank, which torchrun starts in a session of its own; also one that has just ended."""
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return False


def children(pid: int) -> list[int]:
    """Processes that a process started and that have not been reaped."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text(errors="replace").rpartition(")")[2].split()[1]
        except OSError:
            continue  # it has just ended
        if int(parent) == pid:
            found.append(int(stat.parent.name))
    return found


if __name__ == "__main__":
    sys.exit(main())
