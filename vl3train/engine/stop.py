"""How a run is asked to stop: by the signals that schedulers send before SIGKILL."""

from __future__ import annotations

import signal
from multiprocessing import forkserver, resource_tracker

from vl3train.data.render.processes import clean_processes

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Turns the stop signals into a flag, which the step shares with all ranks."""

    def __init__(self) -> None:
        self.requested = False
        for name in STOP_SIGNALS:
            signal.signal(name, self._request)

    def _request(self, *_: object) -> None:
        self.requested = True


def start_workers_ignoring_signals() -> None:
    """Start the fork server of loader workers and decode processes with the stop signals blocked.

    torchrun and schedulers send these signals to every process of a group. A worker that ended by one would end the run
    before it has saved. Forked processes inherit the block; the SIGTERM handler that torch gives its workers never
    runs. The workers end with the loader, or with this process.
    """
    clean_processes()  # sets what the fork server imports
    resource_tracker.ensure_running()  # the fork server needs it; starting it later would unblock SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
