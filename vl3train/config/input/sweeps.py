"""Words of a command line that give an option several values, as Hydra's own sweeper reads them."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from vl3train.config.problems import ConfigError, Problem

MOST_LETTERS = 80
"""Of a run's name; a digest ends a longer one."""


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a sweep: all of its words, and those that differ from run to run as (option, value)."""

    overrides: tuple[str, ...]
    differing: tuple[tuple[str, str], ...]


def sweep_points(overrides: Sequence[str]) -> list[Point]:
    """Every combination of the values; the last option changes fastest. One point where nothing has several values.

    Values are those of Hydra's lists and functions: ``a,b``, ``choice(a,b)``, ``range(1,4)``.

    >>> [point.overrides for point in sweep_points(["stage=1", "a.rank=8,16", "b=range(0,2)"])][1:3]
    [('stage=1', 'a.rank=8', 'b=1'), ('stage=1', 'a.rank=16', 'b=0')]

    Raises ConfigError with every word that Hydra cannot list.
    """
    words: list[list[tuple[str, tuple[tuple[str, str], ...]]]] = []
    found: list[Problem] = []
    for text in overrides:
        override = _parsed(text)
        if (
            override is None or not override.is_sweep_override()
        ):  # what is wrong with a word is told by the config
            words.append([(text, ())])
            continue
        key = override.get_key_element()
        try:
            values = list(override.sweep_string_iterator())
        except (HydraException, AssertionError, ValueError) as error:
            what = " ".join(str(error).split()) or "cannot be listed"
            found.append(Problem(key, text.partition("=")[2], what, "list the values: a,b,c or range(1,4)"))
            continue
        words.append([(f"{key}={value}", ((key, value),)) for value in dict.fromkeys(values)])
    if found:
        raise ConfigError(found)
    return [
        Point(tuple(text for text, _ in chosen), tuple(one for _, differs in chosen for one in differs))
        for chosen in itertools.product(*words)
    ]


def has_several_values(overrides: Sequence[str]) -> bool:
    """Whether a word gives an option several values."""
    return any((parsed := _parsed(text)) is not None and parsed.is_sweep_override() for text in overrides)


def _parsed(text: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(text)
    except (HydraException, ValueError):  # ValueError: a number of thousands of digits
        return None


def point_names(points: Sequence[Point]) -> list[str]:
    """A folder's name for each point, of what differs. An option has its last word where that is enough.

    >>> point_names(sweep_points(["optim.learning_rate=1e-4,3e-4", "adapter.rank=8"]))
    ['learning_rate=0.0001', 'learning_rate=0.0003']
    """
    keys = list(dict.fromkeys(key for point in points for key, _ in point.differing))
    short = short_keys(keys)
    names = []
    for point in points:
        text = ",".join(f"{short[key]}={value}" for key, value in point.differing) or "run"
        name = re.sub(r"[^\w.,=+-]+", "_", text)
        if name != text or len(name) > MOST_LETTERS:
            name = f"{name[:MOST_LETTERS]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
        names.append(name)
    return names


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each option's last word, or its whole name where two have the same.

    >>> short_keys(["a.rank", "b.rank", "b.alpha"])
    {'a.rank': 'a.rank', 'b.rank': 'b.rank', 'b.alpha': 'alpha'}
    """
    last = {key: key.rpartition(".")[2] for key in keys}
    return {key: word if list(last.values()).count(word) == 1 else key for key, word in last.items()}
