"""The wait for the next pack, which a run gives up that was asked to stop: a storage that hangs may never answer.

The rank then takes blank packs of the planned sizes, so that the other ranks, which wait for it in a collective, come
to the end of the step. Such a step changes nothing (engine/step.py).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any, TypeVar

T = TypeVar("T")

GIVE_UP_SIGNAL = signal.SIGUSR2
"""Wakes the main thread from the queue or file that it waits for. SIGALRM is taken (data/shards/patience.py)."""


class _GivenUp(BaseException):
    """Past every ``except Exception`` between the wait and its signal."""


class DataWait:
    """The wait of this process's main thread, in which nothing else waits for data."""

    def __init__(self) -> None:
        self.is_given_up = False
        self.waits = False
        self._shall_end = False
        self._abandoned: list[Iterator[Any]] = []

    def next(self, packs: Iterator[T]) -> T | None:
        """The next of ``packs``; None where the wait is given up, now or before."""
        if self.is_given_up:
            return None
        try:
            self.waits = True
            try:
                return next(packs)
            finally:
                self.waits = False
        except _GivenUp:
            # Its end would wait for workers that hang. The process ends soon, and they with it.
            self._abandoned.append(packs)
            return None

    def end(self, main_thread: int) -> None:
        """From another thread, end the wait that there is."""
        if self.waits:
            self._shall_end = True
            signal.pthread_kill(main_thread, GIVE_UP_SIGNAL)

    def on_signal(self, *_: object) -> None:
        """The handler of GIVE_UP_SIGNAL. One that another program sends does nothing."""
        if self.waits and self._shall_end:
            self.waits, self._shall_end, self.is_given_up = False, False, True
            raise _GivenUp


data_wait = DataWait()
"""Of this process."""
