"""Checkpoints are copied elsewhere behind training; a store that does not answer stops nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from vl3train.engine.mirror.remote import Mirror, MirrorError

LAST_SECONDS = 1800.0
"""For which the end of a run waits for the copy in progress."""
STOP_SECONDS = 10.0
"""The same where it was asked to stop: who asks kills it soon. The checkpoint itself is whole."""
FIRST_SECONDS = 30.0
"""For which a start waits for the place to say whether another run is there."""


def other_run_there(mirror: Mirror, run: Path, has_begun: bool, say: Callable[[str], object]) -> str | None:
    """Why the run may not be copied there, as ``Mirror.other_run``; None also where the place does not say, which is
    told."""
    answers: list[str | None] = []
    told: list[str] = ["it does not answer"]

    def ask() -> None:
        try:
            answers.append(mirror.other_run(run, has_begun=has_begun))
        except MirrorError as error:
            told[0] = str(error)

    asking = threading.Thread(target=ask, name="upload-place", daemon=True)
    asking.start()
    asking.join(FIRST_SECONDS)
    if not answers:
        say(f"run.upload_to={mirror.shown}: {told[0]}. The run goes on, and each checkpoint is tried")
        return None
    return answers[0]


class Uploads:
    """Copies the newest checkpoint of one run to a mirror, one at a time. For the first rank."""

    def __init__(self, run: Path, mirror: Mirror, say: Callable[[str], object]) -> None:
        """``say`` is called from another thread."""
        self._run, self._mirror, self._say = run, mirror, say
        self._wanted: str | None = None
        self._copied: str | None = None
        self._changed = threading.Condition()
        self._is_working = False
        threading.Thread(target=self._work, name="uploads", daemon=True).start()

    def offer(self, checkpoint: str) -> None:
        """Copy a checkpoint that is whole, in place of one that still waits."""
        with self._changed:
            if self._is_working:
                self._say(
                    f"{self._mirror.shown} is slower than saves come: {checkpoint} waits for the copy before it"
                )
            self._wanted = checkpoint
            self._changed.notify_all()

    def finish(self, seconds: float) -> None:
        """Wait for what is on its way; say where that does not come to an end."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._wanted is None and not self._is_working, 1.0):
                self._say(f"waiting for the copy to {self._mirror.shown}, {seconds:.0f} s at most")
                if not self._changed.wait_for(lambda: self._wanted is None and not self._is_working, seconds):
                    self._say(f"{self._mirror.shown} does not answer: the newest checkpoint is not there")

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted is not None)
                name, self._wanted, self._is_working = str(self._wanted), None, True
            started = time.monotonic()
            try:
                num_bytes = self._mirror.put(self._run, name)
            except MirrorError as error:
                self._say(
                    f"{name} could not be copied: {error}. The run goes on, and the next checkpoint is tried"
                )
            else:
                took = time.monotonic() - started
                self._say(f"{name} is in {self._mirror.shown}: {num_bytes / 2**20:,.0f} MiB in {took:.0f} s")
            with self._changed:
                self._is_working = False
                self._changed.notify_all()
