"""What a report about silence says: who is behind, what each rank and each loader worker does, where they stand."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl3train.contracts.progress.record import GONE, IDLE, RUNS, Seen

SHOWN_KEYS_LETTERS = 240
SHOWN_RANKS = 16
"""On the console, if there are more; the others are counted by what they do."""
SHOWN_STACKS, SHOWN_FRAMES = 2, 8
"""Whose stacks are on the console too, and how much of them. All is in the file."""
MAIN_THREAD = "MainThread"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one rank knows: the records of its node, and its own stacks."""

    rank: int
    host: str
    records: list[Seen]
    stacks: dict[str, list[str]]  # by thread: lines, the innermost call last

    def as_plain(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> Answer:
        """The inverse."""
        return Answer(**{**plain, "records": [Seen(**seen) for seen in plain["records"]]})


def python_stacks() -> dict[str, list[str]]:
    """Where each thread of this process is, by the thread's name."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = {}
    for number, frame in sys._current_frames().items():
        if number != threading.get_ident():
            lines = [
                f"{entry.filename}:{entry.lineno} in {entry.name}: {entry.line}"
                for entry in traceback.extract_stack(frame)
            ]
            found[names.get(number, f"thread {number}")] = lines
    return found


class Report:
    """The answers of some ranks, put together."""

    def __init__(self, answers: Sequence[Answer], *, dp_size: int, silent_seconds: float) -> None:
        """``answers``: that of the rank that reports is the first."""
        self._answers = {answer.rank: answer for answer in answers}
        self._dp_size, self._seconds = dp_size, silent_seconds
        self._hosts: dict[str, str] = {}
        records: dict[str, Seen] = {}
        for answer in answers:
            for seen in answer.records:
                if seen.name not in records or (seen.rank == answer.rank and not seen.is_worker):
                    records[seen.name], self._hosts[seen.name] = seen, answer.host
        self._ranks = sorted(
            (seen for seen in records.values() if not seen.is_worker), key=lambda seen: seen.rank
        )
        self._workers = [seen for seen in records.values() if seen.is_worker]

    def somebody_works(self, seconds: float) -> bool:
        """Whether a rank made progress within so many seconds: the others wait for it, as they should."""
        return any(seen.seconds < seconds for seen in self._ranks)

    def behind(self) -> list[Seen]:
        """Ranks that did less of the run than others: the others wait for them. None where all are as far."""
        far = {seen.rank: (seen.step, seen.changes) for seen in self._ranks}
        least = min(far.values())
        if all(value == least for value in far.values()):
            return [seen for seen in self._ranks if seen.state not in (RUNS, GONE)]
        return [seen for seen in self._ranks if far[seen.rank] == least]

    def short_text(self, path: Path) -> str:
        """For the console. ``path``: where the full text will be."""
        lines = [self._title(), *self._lines(SHOWN_KEYS_LETTERS, full=False)]
        for seen in self.behind()[:SHOWN_STACKS] or self._ranks[:1]:
            if answer := self._answers.get(seen.rank):
                stack = answer.stacks.get(MAIN_THREAD, [])[-SHOWN_FRAMES:]
                lines += [
                    f"  rank {seen.rank} is at (innermost call last):",
                    *(f"    {line}" for line in stack),
                ]
        return "\n".join([*lines, f"  stacks of all threads: {path}"])

    def full_text(self) -> str:
        """For the file."""
        lines = [time.strftime("%Y-%m-%d %H:%M:%S"), self._title(), *self._lines(10**6, full=True)]
        for rank, answer in sorted(self._answers.items()):
            for thread, stack in answer.stacks.items():
                lines += [f"rank {rank}, {thread} (innermost call last):", *(f"    {line}" for line in stack)]
        return "\n".join(lines) + "\n"

    def _title(self) -> str:
        return f"silence: no progress for {self._seconds:.0f} s. The run waits on. What each process does:"

    def _lines(self, letters: int, *, full: bool) -> list[str]:
        shown = self._ranks if full or len(self._ranks) <= SHOWN_RANKS else self.behind()[:SHOWN_RANKS]
        lines = [f"  {self._rank_line(seen, letters)}" for seen in shown]
        by_phase = Counter(seen.where() for seen in self._ranks if seen not in shown)
        lines += [f"  {count} other ranks: {where}" for where, count in by_phase.most_common(SHOWN_RANKS)]
        known = {seen.rank for seen in self._ranks}
        if missing := [str(rank) for rank in range(self._dp_size) if rank not in known]:
            lines.append(f"  rank {', '.join(missing)}: no answer, and no rank of its node answers for it")
        for seen in self._workers:
            if full or seen.state != RUNS or seen.sample != IDLE:
                lines.append(f"  {self._worker_line(seen)}")
        if behind := self.behind():
            who = ", ".join(f"rank {seen.rank} ({seen.where()})" for seen in behind[:SHOWN_RANKS])
            lines.append(f"  behind: {who}; the others wait for it")
        return lines

    def _rank_line(self, seen: Seen, letters: int) -> str:
        packs = seen.packs if len(seen.packs) <= letters else f"{seen.packs[:letters]} ..."
        reads = f"; its loader: {sample_in_work(seen)}" if seen.sample not in ("", IDLE) else ""
        silent = "" if seen.rank in self._answers else ", does not answer"
        return (
            f"rank {seen.rank} ({self._process(seen)}{silent}): {seen.where()}, for {seen.seconds:.0f} s{reads}"
            + (f"; samples of the step: {packs}" if packs else "")
        )

    def _worker_line(self, seen: Seen) -> str:
        number = seen.name.split("-")[2]
        return (
            f"loader worker {number} of rank {seen.rank} ({self._process(seen)}): {sample_in_work(seen)}, "
            f"for {seen.seconds:.0f} s"
        )

    def _process(self, seen: Seen) -> str:
        state = "" if seen.state == RUNS else f" {seen.state}"
        return f"process {seen.process} on {self._hosts[seen.name]}{state}"


def sample_in_work(seen: Seen) -> str:
    """The loader's sample, with the shard and bytes where one is read."""
    return f"{seen.sample} ({seen.place})" if seen.place else seen.sample or seen.phase
