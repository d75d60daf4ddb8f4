"""Questions that come at any time, answered by one thread: those that wait join the ones in progress."""

from __future__ import annotations

import dataclasses
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vl3train.inference.answer import Asker
from vl3train.inference.answering import Answered, Answering, Asked
from vl3train.model.generation.sampling import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A question that waits for its turn. Both functions, and those of ``asked``, are called in the thread."""

    asker: Asker
    sampling: Sampling
    seed: int | None  # so that the same seed draws the same again, its question is answered alone
    asked: Asked
    answered: Callable[[Answered], None]
    failed: Callable[[Exception], None]

    @property
    def goes_with(self) -> tuple[int, Sampling, str | None]:
        """The same for questions that can be in progress together: of one model, drawn in the same way."""
        return id(self.asker), self.sampling, None if self.seed is None else self.asked.key


class LiveModels:
    """Answers questions of one or several models that share a device, in the order in which they come.

    Questions of one model with the same sampling settings are answered together, up to ``num_slots`` at a time. One of
    another kind waits until those in progress have ended, and those behind it wait with it.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._changed = threading.Condition()
        self._waiting: deque[Waiting] = deque()
        self._in_progress: dict[str, Waiting] = {}
        self._answering: dict[int, tuple[object, Answering]] = {}
        self._ends = False
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Questions that are not in progress yet."""
        return len(self._waiting)

    @property
    def num_in_progress(self) -> int:
        """Questions that are being answered."""
        return len(self._in_progress)

    @property
    def is_alive(self) -> bool:
        """Whether questions are still answered."""
        return self._thread.is_alive()

    def ask(self, waiting: Waiting) -> None:
        """Put a question behind those that wait."""
        with self._changed:
            self._waiting.append(waiting)
            self._changed.notify()

    def close(self) -> None:
        """Cut what is in progress, forget what waits, and end the thread."""
        with self._changed:
            self._ends = True
            self._waiting.clear()
            for waiting in self._in_progress.values():
                waiting.asked.is_wanted = lambda: False
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ends)
                if self._ends:
                    return
                kind = self._waiting[0]
            try:
                for answered in self._answering_of(kind).answers(self._questions(kind)):
                    with self._changed:
                        waiting = self._in_progress.pop(answered.asked.key)
                    waiting.answered(answered)
            except (
                Exception
            ) as error:  # the device is out of memory, or a bug: those that wait are not to blame
                self._answering.pop(id(kind.asker), None)
                with self._changed:
                    failed = [*self._in_progress.values()] or [self._waiting.popleft()]
                    self._in_progress.clear()
                for waiting in failed:
                    waiting.failed(error)

    def _answering_of(self, kind: Waiting) -> Answering:
        """The one that the model has; or a new one, where it draws in another way. The memory is for one only."""
        had = self._answering.get(id(kind.asker))
        if had is not None and had[0] == kind.goes_with:
            return had[1]
        del had
        self._answering.pop(id(kind.asker), None)
        seed = secrets.randbits(63) if kind.seed is None else kind.seed
        made = kind.asker.new_answering(self._num_slots, dataclasses.replace(kind.sampling, seed=seed))
        self._answering[id(kind.asker)] = kind.goes_with, made
        return made

    def _questions(self, kind: Waiting) -> Iterator[Asked | None]:
        """Those that wait and go with ``kind``; a None where there is none while others are answered."""
        while True:
            with self._changed:
                while self._waiting and not self._waiting[0].asked.is_wanted():
                    self._waiting.popleft()
                if self._ends or (self._waiting and self._waiting[0].goes_with != kind.goes_with):
                    return
                if not self._waiting and not self._in_progress:
                    return
                waiting = self._waiting.popleft() if self._waiting else None
                if waiting is not None:
                    self._in_progress[waiting.asked.key] = waiting
            yield None if waiting is None else waiting.asked
