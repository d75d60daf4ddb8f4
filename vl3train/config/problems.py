"""Mistakes in a config: one record for each, and the error that holds all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake. ``str()`` is one line: key=value, what is wrong, what to do."""

    key: str
    value: object
    what: str
    way_out: str

    def __str__(self) -> str:
        named = self.key if self.value == "" else f"{self.key}={show(self.value)}"
        return f"{named}: {self.what}; {self.way_out}" if self.way_out else f"{named}: {self.what}"


class ConfigError(ValueError):
    """A config that cannot run. The message lists everything that is wrong with it."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = f"{counted(len(problems), 'problem')} in the configuration"
        lines = [f"{number}. {problem}" for number, problem in enumerate(problems, start=1)]
        super().__init__("\n".join([f"{count}:", *lines]))


def counted(number: float, word: str) -> str:
    """A number of things, in the singular or plural.

    >>> counted(1, "rank"), counted(1.0, "frame"), counted(1200, "pack"), counted(0.5, "frame")
    ('1 rank', '1 frame', '1,200 packs', '0.5 frames')
    """
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {word}" if number == 1 else f"{shown} {word}s"


def show(value: object) -> str:
    """A value as a user writes it on the command line.

    >>> show(None), show(True), show(1e-05), show("runs/a")
    ('null', 'true', '1e-05', 'runs/a')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(getattr(value, "value", value))
