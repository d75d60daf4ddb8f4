"""A record: what one process works on.

Each rank and each loader worker keeps one *record*: a file of 16 KiB, mapped into its memory. To write into it takes no
system call. Readers are the watch threads of the ranks of this node (engine/monitor/silence.py) and the launcher.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD_BYTES = 16384
PROCESS = struct.Struct("<q")
NUMBERS = struct.Struct("<qqqd")
"""Step, micro-batch, changes of phase in the step; time of the last progress."""
TEXTS = {"phase": (64, 128), "sample": (192, 832), "place": (1024, 1024), "packs": (2048, 8192)}
"""Where each text begins, and its room in bytes. Two bytes of its length come first."""
NO_MICRO_BATCH = -1
WAITING_FOR_DATA = "waiting for data"
IDLE = "nothing"
"""What a loader does between two packs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a record says. ``seconds``: since the last progress."""

    name: str  # of the file: rank-3, rank-3.worker-0-4711
    process: int
    step: int
    micro_batch: int
    changes: int
    seconds: float
    phase: str
    sample: str  # in work
    place: str  # that is read: shard and bytes
    packs: str  # keys of the samples in work, where a step has them
    state: str  # of the process: see ``process_state``

    @property
    def rank(self) -> int:
        """The rank that it is, or that it works for."""
        return int(self.name.split(".")[0].removeprefix("rank-"))

    @property
    def is_worker(self) -> bool:
        """Whether it is a loader's worker."""
        return ".worker-" in self.name

    def where(self) -> str:
        """Phase, step and micro-batch in words."""
        text = self.phase
        if self.micro_batch != NO_MICRO_BATCH:
            text += f" of micro-batch {self.micro_batch}"
        return text if self.step < 0 else f"{text}, step {self.step}"

    def as_plain(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


class Progress:
    """The record of this process. One thread writes, the main thread."""

    def __init__(self) -> None:
        self._memory: bytearray | mmap.mmap = bytearray(RECORD_BYTES)
        self.path: Path | None = None
        self._step, self._micro_batch, self._changes = -1, NO_MICRO_BATCH, 0

    def keep_in(self, path: Path) -> None:
        """From now on keep the record in a file. Where the disk has no room for it, nobody else sees it."""
        try:
            with path.open("w+b") as file:
                # The room is taken now: a write into mapped memory that finds none ends the process by SIGBUS.
                os.posix_fallocate(file.fileno(), 0, RECORD_BYTES)
                memory = mmap.mmap(file.fileno(), RECORD_BYTES)
        except OSError as error:
            path.unlink(missing_ok=True)
            print(
                f"{path} cannot be written: {error.strerror or error}. If this process stands still or dies, nobody "
                "will say where it was",
                file=sys.stderr,
            )
            return
        memory[:] = bytes(self._memory)
        PROCESS.pack_into(memory, 0, os.getpid())
        self._memory, self.path = memory, path
        self.touch()

    def phase(self, name: str, *, step: int | None = None, micro_batch: int = NO_MICRO_BATCH) -> None:
        """A phase begins, of a new step where one is given."""
        if step is not None:
            self._step, self._changes = step, 0
        self._changes += 1
        self._micro_batch = micro_batch
        self._write("phase", name)
        self.touch()

    def touch(self) -> None:
        """The phase goes on, and makes progress."""
        NUMBERS.pack_into(
            self._memory, PROCESS.size, self._step, self._micro_batch, self._changes, time.monotonic()
        )

    def packs(self, keys: list[str]) -> None:
        """The samples of the packs of this step."""
        self._write("packs", ", ".join(keys))

    def sample(self, key: str, doing: str) -> None:
        """The sample that the loader works on, and what it does with it. In a rank without workers its phase stays."""
        self._write("sample", f"{doing} {key}".strip())
        self._write("place", "")
        self.touch()

    def place(self, text: str) -> None:
        """What is read: shard and bytes. No progress by itself: a read that is tried again comes here too."""
        self._write("place", text)

    def seen(self) -> Seen:
        """As others see it."""
        return seen_in(self.path.name if self.path else "rank-0", self._memory)

    def _write(self, name: str, text: str) -> None:
        start, room = TEXTS[name]
        data = text.encode()[: room - 2]
        self._memory[start : start + 2] = len(data).to_bytes(2, "little")
        self._memory[start + 2 : start + 2 + len(data)] = data


progress = Progress()
"""Of this process."""


RUNS, STOPPED_BY_SIGNAL, WAITS_FOR_DISK, GONE = "runs", "stopped by a signal", "waits for a disk", "has ended"


def process_state(pid: int) -> str:
    """What the kernel says of a process of this machine.

    >>> process_state(os.getpid())
    'runs'
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            letter = file.read().rpartition(")")[2].split()[0]
    except OSError:
        return GONE
    return {"T": STOPPED_BY_SIGNAL, "t": STOPPED_BY_SIGNAL, "D": WAITS_FOR_DISK, "Z": GONE, "X": GONE}.get(
        letter, RUNS
    )


def seen_in(name: str, data: bytes | bytearray | mmap.mmap) -> Seen:
    """What the record of a file of this name says now."""
    (process,) = PROCESS.unpack_from(data, 0)
    step, micro_batch, changes, since = NUMBERS.unpack_from(data, PROCESS.size)
    texts = {}
    for text, (start, room) in TEXTS.items():
        length = min(int.from_bytes(data[start : start + 2], "little"), room - 2)
        texts[text] = bytes(data[start + 2 : start + 2 + length]).decode(errors="replace")
    return Seen(
        name=name,
        process=process or os.getpid(),
        step=step,
        micro_batch=micro_batch,
        changes=changes,
        seconds=time.monotonic() - since,
        state=process_state(process or os.getpid()),
        **texts,
    )
