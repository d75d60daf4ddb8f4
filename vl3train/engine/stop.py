"""How a run is asked to stop at the next step's end: by a signal, by its time limit, by the end of its launcher."""

from __future__ import annotations

import contextlib
import datetime
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from vl3train.contracts.exit_codes import INTERRUPTED, STOP_SIGNALS, STOPPED, leave_code
from vl3train.data.data_wait import GIVE_UP_SIGNAL, data_wait

SECONDS_WITHOUT_LAUNCHER = 40.0
"""For the step in progress and the save; then the process ends. Nobody restarts it, and its GPU is wanted."""
SECONDS_FOR_DATA = 10.0
"""A rank that was asked to stop and waits for data gives up the wait after so long: a storage that hangs may not
answer for ever. Only the step in progress is lost, and the others wait for it."""
LOOK_SECONDS = 0.5
STORE_SECONDS = 5.0
"""For an answer of the ranks' store, which takes milliseconds."""
SECONDS_BETWEEN_INTERRUPTS = 1.0
"""A second Ctrl-C this much later means now. Queues and torchrun send the same signal twice within milliseconds."""


class StopRequest:
    """A flag that a signal, the time limit or the launcher's end sets, and that the step shares with all ranks."""

    def __init__(self, max_hours: float | None = None) -> None:
        """Listen to the signals from now on. ``max_hours`` counts from the start of this process."""
        data_wait.is_given_up = False  # of an earlier run in this process
        self._requested = False
        self._interrupted_at: float | None = None
        self._deadline = (
            None if max_hours is None else time.monotonic() - seconds_since_start() + 3600 * max_hours
        )
        self._others = OtherRanks() if dist.is_initialized() and dist.get_world_size() > 1 else None
        self._is_closed = threading.Event()
        # Python calls a handler only when the main thread comes back to it, and one that waits for other ranks in a
        # collective may not. A signal's number is in this pipe at once.
        self._heard, self._wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        self._before = {
            name: signal.signal(name, lambda *_: None)
            for name in STOP_SIGNALS
            if signal.getsignal(name) is not signal.SIG_IGN  # nohup ignores SIGHUP
        }
        self._before[GIVE_UP_SIGNAL] = signal.signal(GIVE_UP_SIGNAL, data_wait.on_signal)
        self._thread = threading.Thread(target=self._watch, name="stop-watch", daemon=True)
        self._thread.start()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            when_gone(os.getppid(), self._launcher_is_gone)

    def close(self) -> None:
        """Let the signals do again what they did before."""
        for name, handler in self._before.items():
            signal.signal(name, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._is_closed.set()
        os.write(self._wakeup, b"\0")
        self._thread.join()
        os.close(self._wakeup)
        os.close(self._heard)

    @property
    def requested(self) -> bool:
        """Whether this rank wants to stop. Asked once a step."""
        return self._requested or (self._deadline is not None and time.monotonic() >= self._deadline)

    def _hear(self, now: float, *, is_interrupt: bool) -> None:
        if is_interrupt:
            before, self._interrupted_at = self._interrupted_at, now
            if before is not None and now - before >= SECONDS_BETWEEN_INTERRUPTS:
                leave_code(INTERRUPTED)  # nothing was saved, which must not look like a stop
                os._exit(INTERRUPTED)
        self._requested = True

    def _watch(self) -> None:
        """Hear signals, share the request with ranks that wait for data, and end that wait."""
        main_thread, asked_at = threading.main_thread().ident, None
        assert main_thread is not None, "it runs"
        poll = select.poll()
        poll.register(self._heard, select.POLLIN)
        while not self._is_closed.is_set():
            heard = os.read(self._heard, 4096) if poll.poll(1000 * LOOK_SECONDS) else b""
            now = time.monotonic()
            if not STOP_SIGNALS.isdisjoint(heard):
                self._hear(now, is_interrupt=signal.SIGINT in heard)
            if self._others is not None and data_wait.waits and self._others.were_asked():
                self._requested = True
            if asked_at is None and self.requested:
                asked_at = now
                if self._others is not None:
                    self._others.tell()
            if asked_at is not None and now - asked_at >= SECONDS_FOR_DATA:
                data_wait.end(main_thread)

    def _launcher_is_gone(self) -> None:
        print(
            "\nthe launcher (torchrun) is gone: the run saves after this step and ends",
            file=sys.stderr,
            flush=True,
        )
        self._requested = True
        time.sleep(SECONDS_WITHOUT_LAUNCHER)
        os._exit(STOPPED)


class OtherRanks:
    """What ranks tell each other of a stop while one of them waits for data, and takes no part in a collective: only
    one node, or one process, may have been asked. Through the store at which they met, where that still answers."""

    def __init__(self) -> None:
        seconds = datetime.timedelta(seconds=STORE_SECONDS)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: a thread that waits for an answer on the other one keeps it to itself.
        self._store = dist.TCPStore(address, port, is_master=False, timeout=seconds, wait_for_workers=False)
        self._key = f"vl3train/stop/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    def tell(self) -> None:
        """Say that this rank was asked to stop."""
        with contextlib.suppress(RuntimeError):  # it is gone with the launcher of the first node
            self._store.set(self._key, "")

    def were_asked(self) -> bool:
        """Whether another rank was asked to stop."""
        with contextlib.suppress(RuntimeError):
            return self._store.check([self._key])
        return False


def when_gone(pid: int, act: Callable[[], object]) -> None:
    """Call ``act`` in a thread of its own as soon as a process, the parent of this one, has ended."""

    def wait() -> None:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            pass  # already
        else:
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            poll.poll()
        act()

    if hasattr(os, "pidfd_open"):  # Linux 5.3
        threading.Thread(target=wait, name="launcher-watch", daemon=True).start()


def seconds_since_start() -> float:
    """The age of this process, whose imports count too. By a clock that nobody sets."""
    with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    with open("/proc/uptime", encoding="ascii") as file:
        up = float(file.read().split()[0])
    return up - ticks / os.sysconf("SC_CLK_TCK")
