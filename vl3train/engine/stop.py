"""How a run is asked to stop: by the signals that schedulers send before they kill."""

from __future__ import annotations

import signal
from multiprocessing import forkserver, resource_tracker

from vl3train.data.render.processes import clean_processes

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Turns the stop signals into a flag that the step shares."""

    def __init__(self) -> None:
        self.requested = False
        for name in STOP_SIGNALS:
            signal.signal(name, self._request)

    def _request(self, *_: object) -> None:
        self.requested = True


def start_workers_ignoring_signals() -> None:
    """Start the server that loader workers and decode processes are forked from, with the stop signals blocked.

    torchrun and schedulers send them to every process of a group. Workers that died of them would take the run along
    before it has saved. A blocked signal stays so in all that is forked, and under the handler for SIGTERM that torch
    gives its workers. They end with the loader, or with this process.
    """
    clean_processes()  # says what the server imports
    resource_tracker.ensure_running()  # the server needs it, and starting it lifts the block of SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
