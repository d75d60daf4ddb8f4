"""Saves that do not stop training: the state is copied to the host, and a thread writes the copy.

A checkpoint appears when it is whole; until then the one before is the newest. One save is written at a time.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vl3train.engine.checkpoints.keep import Keep
from vl3train.engine.checkpoints.random_state import random_state
from vl3train.engine.checkpoints.save import Snapshot, WriteWeights, write_checkpoint
from vl3train.engine.ranks import Rank
from vl3train.engine.zero.engine import Zero
from vl3train.engine.zero.host_copies import HostCopies
from vl3train.model.weights.headers.manifest import checkpoint_name

LAST_SECONDS = 30.0
"""For which a run that ends with an error waits for the save in progress: all processes are to end within 60 s."""
LONG_WAIT = 1.0
"""Seconds for which training waits for the save before, from which on that is said."""


class Saver:
    """Writes the checkpoints of one run."""

    def __init__(
        self,
        checkpoints: Path,
        *,
        engine: Zero,
        write_weights: WriteWeights,
        rank: Rank,
        in_background: bool,
        step: int,
        say: Callable[[str], object],
        when_whole: Callable[[str], object] = lambda _: None,
    ) -> None:
        """``when_whole`` gets the name of each checkpoint that is written, on the first rank, in the thread that wrote
        it. ``step`` is that of the newest checkpoint, 0 without one. All ranks make theirs together.

        Without ``in_background`` each save is written before training goes on, and the state is not copied.
        """
        self._checkpoints, self._engine, self._write_weights, self._say = (
            checkpoints,
            engine,
            write_weights,
            say,
        )
        self._when_whole = when_whole
        self.in_background = in_background
        # Its collectives run beside the step's: on a group of their own, of the host.
        self._writing_rank = rank
        if in_background and rank.dp_size > 1:
            group: Any = dist.new_group(backend="gloo")
            self._writing_rank = dataclasses.replace(rank, group=group)
        self._copies = HostCopies(rank.device) if in_background else None
        if self._copies is not None:
            self._copies.reserve(engine.bytes_to_save())
        self._is_told = False  # that its memory is not page-locked
        self._thread: threading.Thread | None = None
        self._is_settled = True  # whether it is known that the last save is whole, or why it is not
        self._problem: str | None = None  # of the save in progress, or just written
        self._failure: BaseException | None = None  # of this program
        self._whole_step = step
        self._waited = 0.0
        self.step = step
        """Step of the newest checkpoint, whole or being written. The same on all ranks."""

    def begin(self, step: int, *, resume: dict[str, Any], keep: Keep) -> None:
        """Save the run after ``step`` steps. All ranks call it; ``wait`` says whether the disk took it.

        ``resume`` is what resume.json will hold, on rank 0.
        """
        self.wait()
        started = time.perf_counter()
        if self._copies is not None:
            self._copies.begin()
        state = self._engine.take_state(self._copies)
        if self._copies is not None:
            self._copies.finish()
            self._tell_of_pages(self._copies)
        snapshot = Snapshot(step=step, engine=state, random=random_state(), resume=resume)
        self.step, self._is_settled = step, False
        if self.in_background:
            self._thread = threading.Thread(
                target=self._write, args=(snapshot, keep), name=f"save-{step}", daemon=True
            )
            self._thread.start()
        else:  # here: another thread's collectives would take the first GPU
            self._write(snapshot, keep)
        self._waited += time.perf_counter() - started

    def wait(self) -> str | None:
        """Wait for the save in progress, and tell a problem. All ranks call it.

        Returns None where it is whole or there is none; else why the disk did not take it, on every rank: ``step`` is
        then that of the checkpoint before.
        """
        if self._is_settled:
            return None
        started = time.perf_counter()
        if self._thread is not None:
            self._thread.join(LONG_WAIT)
        if self._thread is not None and self._thread.is_alive():
            self._say(
                f"the checkpoint of step {self.step} is still being written; training waits for it. Where that comes "
                "often, raise run.save_steps, or save to a faster disk"
            )
            self._thread.join()
        self._thread, self._is_settled = None, True
        self._waited += time.perf_counter() - started
        self.raise_failure()
        if self._problem is None:
            self._whole_step = self.step
        else:
            self.step = self._whole_step
        return self._problem

    def leave(self) -> None:
        """The run ends with an error: give the save in progress the time that there is. Needs no other rank's call."""
        if self._thread is not None:
            self._thread.join(LAST_SECONDS)

    def raise_failure(self) -> None:
        """Raise what ended the thread on this rank, where that was no fault of the disk. Call it each step."""
        if self._failure is not None:
            raise self._failure

    def take_waited_seconds(self) -> float:
        """Seconds for which training has waited for saves since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def went_back(self, step: int) -> None:
        """The run has gone back to the checkpoint of ``step``."""
        self.step = self._whole_step = step

    def _tell_of_pages(self, copies: HostCopies) -> None:
        if copies.problem is not None and not self._is_told:
            self._is_told = True
            self._say(
                f"CUDA did not page-lock the host's memory for a copy of the state ({copies.problem}): training stands "
                "still some times as long at each save. Look at the limit of locked memory (ulimit -l)"
            )

    def _write(self, snapshot: Snapshot, keep: Keep) -> None:
        try:
            self._problem = write_checkpoint(
                self._checkpoints,
                snapshot,
                write_weights=self._write_weights,
                rank=self._writing_rank,
                keep=keep,
            )
            if self._problem is None and self._writing_rank.is_first:
                self._when_whole(checkpoint_name(snapshot.step))
        except BaseException as error:  # raised again by the thread that trains
            self._failure = error
