"""A thread in each rank that notices when nothing goes on, and reports once what every rank does.

Ranks wait for each other in each step, so all of them fall silent within moments. The first that notices asks through
the process group's store; the watch threads of the others answer. A rank whose process is stopped cannot answer: its
record (contracts/progress) is read by the ranks of its node. In a GPU's stream nothing is read or waited for.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vl3train.config.schema import RunConfig
from vl3train.contracts.progress.job import read_records
from vl3train.contracts.progress.record import WAITING_FOR_DATA, Seen, progress
from vl3train.contracts.strict_json import json_text
from vl3train.engine.monitor.silence_report import Answer, Report, python_stacks
from vl3train.engine.ranks import Rank

FIRST_TICK, LONGEST_TICK = 0.1, 15.0
"""Seconds between two looks at the record; a twentieth of the limit between them. A look takes 0.1 ms."""
KEY = "vl3train/silence"


@contextlib.contextmanager
def watched(run: RunConfig, rank: Rank) -> Iterator[None]:
    """Watch this rank's progress until the end of the block."""
    watch = SilenceWatch(run, rank)
    thread = threading.Thread(target=watch.look_on, name="silence-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        watch.ends.set()
        thread.join(1.0)


class SilenceWatch:
    """The state of one rank's watch thread."""

    def __init__(self, run: RunConfig, rank: Rank) -> None:
        self.ends = threading.Event()
        self._run, self._rank = run, rank
        self._tick = min(max(run.silence_seconds / 20, FIRST_TICK), LONGEST_TICK)
        # A connection of its own: the main thread may hold the other while it waits for a rank that hangs.
        self._store = dist.distributed_c10d._get_default_store().clone() if rank.dp_size > 1 else None
        self._answered = self._asked()  # number of the last question that this rank has answered
        self._first_step: int | None = None
        self._patience = 1  # doubles with each report, while the silence goes on
        self._reported_after = 0.0
        self._before = progress.seen()

    def look_on(self) -> None:
        """Look at the record again and again."""
        while not self.ends.wait(self._tick):
            try:
                self._look()
            except (
                dist.DistError
            ):  # the launcher is gone, and the run ends; until then this rank watches itself
                self._store = None

    def _look(self) -> None:
        seen = progress.seen()
        if self._first_step is None and seen.step >= 0:
            self._first_step = seen.step
        if seen.seconds < self._before.seconds or seen.changes != self._before.changes:
            if self._reported_after:
                self._say(f"progress again: rank {self._rank.index} goes on with {seen.where()}")
            self._patience, self._reported_after = 1, 0.0
        self._before = seen
        asked = self._asked()
        if asked > self._answered:
            self._answer(asked, seen)
        elif seen.seconds >= self._patience * self._limit(seen):
            self._ask(seen)

    def _limit(self, seen: Seen) -> float:
        starts = seen.step < 0 or seen.step == self._first_step
        if seen.phase != WAITING_FOR_DATA and (starts or seen.phase == "save"):
            return max(self._run.start_silence_seconds, self._run.silence_seconds)
        return self._run.silence_seconds

    def _asked(self) -> int:
        return 0 if self._store is None else int(self._store.add(f"{KEY}/asked", 0))

    def _answer(self, number: int, seen: Seen) -> None:
        self._answered = number
        if seen.seconds >= self._limit(seen) / 2:
            self._patience *= 2  # that report is about this rank, too
        assert self._store is not None, "it was asked"
        self._store.set(f"{KEY}/{number}/{self._rank.index}", json_text(self._own_answer().as_plain()))

    def _own_answer(self) -> Answer:
        records = (
            {} if progress.path is None else {seen.name: seen for seen in read_records(progress.path.parent)}
        )
        own = progress.seen()
        records[own.name] = own
        return Answer(
            rank=self._rank.index,
            host=socket.gethostname(),
            records=list(records.values()),
            stacks=python_stacks(),
        )

    def _ask(self, seen: Seen) -> None:
        self._patience *= 2
        answers = [self._own_answer()]
        if self._store is not None:
            if self._store.add(f"{KEY}/{self._answered + 1}/claim", 1) > 1:
                self._patience //= 2
                return  # another rank asks; its question comes with the next look
            self._answered = int(self._store.add(f"{KEY}/asked", 1))
            answers += self._gather(self._answered)
        report = Report(answers, dp_size=self._rank.dp_size, silent_seconds=seen.seconds)
        if report.somebody_works(self._limit(seen) / 2):
            return
        self._reported_after = seen.seconds
        moment = time.strftime("%Y-%m-%d_%H-%M-%S")
        path = Path(self._run.output_dir) / "silence" / f"{moment}.rank{self._rank.index}.txt"
        self._say(report.short_text(path))
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text(report.full_text(), encoding="utf-8")
        except OSError as error:
            self._say(f"{path} could not be written: {error}\n{report.full_text()}")

    def _gather(self, number: int) -> list[Answer]:
        """The answers of the other ranks that come within some ticks."""
        assert self._store is not None, "there are others"
        keys = {f"{KEY}/{number}/{rank}" for rank in range(self._rank.dp_size) if rank != self._rank.index}
        found: list[Answer] = []
        deadline = time.monotonic() + 2 * self._tick + 2.0
        while keys and time.monotonic() < deadline and not self.ends.wait(0.05):
            for key in [key for key in sorted(keys) if self._store.check([key])]:
                keys.remove(key)
                plain: dict[str, Any] = json.loads(self._store.get(key))
                found.append(Answer.from_plain(plain))
                self._store.delete_key(key)
        return found

    def _say(self, text: str) -> None:
        print(f"\n{text}", file=sys.stderr, flush=True)  # with a bar on the terminal rich puts it above
