"""Logs that end no run.

Where the disk does not take a line of a log, it waits in memory for the next try. What is printed to a terminal that
was closed, a pipe whose reader has gone, or a file on a full disk is lost.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO


def say_on_stderr(text: str) -> None:
    """Print a message of a log to standard error."""
    print(text, file=sys.stderr, flush=True)


class LineLog:
    """Appends whole lines to a file that only this process writes.

    When ``append`` returns, the operating system has the lines: a killed process loses none. A line that the disk took
    half of is taken back. A folder that is not there is not made: it was moved away, and may come back.
    """

    def __init__(self, path: Path, say: Callable[[str], object] = say_on_stderr) -> None:
        """``say`` gets a message when the file cannot be written, and one when it can be again."""
        self._path, self._say = path, say
        self._waiting: list[str] = []
        self._whole_bytes: int | None = None  # of the file before a try that failed
        self._bytes = 0  # of the file after the last try
        self._failing = False

    def append(self, lines: Iterable[str]) -> None:
        """Write lines without their ends, and those that still wait. Does not raise where the disk fails."""
        self._waiting += lines
        if not self._waiting:
            return
        try:
            self._write("".join(line + "\n" for line in self._waiting).encode())
        except OSError as error:
            if not self._failing:
                self._say(
                    f"{self._path} cannot be written: {error.strerror or error}. The run goes on; its lines wait in "
                    "memory and are written when that works again"
                )
            self._failing = True
            return
        if self._failing:
            self._say(f"{self._path} is written again, with the {len(self._waiting)} lines that waited")
        self._failing = False
        self._waiting = []

    def was_cut(self) -> None:
        """The caller has taken lines out of the file."""
        self._bytes = 0

    def close(self) -> None:
        """Try once more, and say how many lines are lost."""
        self.append([])
        if self._waiting:
            self._say(f"{self._path}: its last {len(self._waiting)} lines could not be written and are lost")

    def _write(self, content: bytes) -> None:
        with self._path.open("ab", buffering=0) as file:
            if self._whole_bytes is not None:
                file.truncate(self._whole_bytes)
            self._whole_bytes = file.seek(0, 2)
            if self._whole_bytes < self._bytes:
                self._say(
                    f"{self._path} was removed or cut: it had {self._bytes} bytes, and has {self._whole_bytes}. The "
                    "run goes on; those lines are lost"
                )
            written = file.write(content)
            while written < len(content):
                written += file.write(content[written:])
            self._bytes = self._whole_bytes + written
            self._whole_bytes = None


class Output:
    """A text stream whose writes never raise OSError. What cannot be written is lost; the other stream says so once."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name
        self._told = False
        self.other: TextIO | None = None

    def write(self, text: str) -> int:
        """Write, or lose the text."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._tell(error)
        return len(text)

    def flush(self) -> None:
        """Flush what can be written."""
        try:
            self._stream.flush()
        except OSError as error:
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if self._told or self.other is None:
            return
        self._told = True
        why = error.strerror or error
        with contextlib.suppress(OSError):
            self.other.write(f"\n{self._name} cannot be written: {why}. The run goes on; that text is lost\n")
            self.other.flush()

    def __getattr__(self, name: str) -> Any:
        """Everything else is the stream's."""
        return getattr(self._stream, name)


def let_output_fail() -> None:
    """From now on neither standard output nor standard error of this process raises where it cannot be written."""
    out, err = Output(sys.stdout, "standard output"), Output(sys.stderr, "standard error")
    out.other, err.other = sys.stderr, sys.stdout
    sys.stdout, sys.stderr = out, err
