"""Values that would call a function when they are read: ``${oc.env:NAME}`` puts a variable of the environment there.

Config files come from other people, too, and what is in a config is printed, saved and tracked. ``${data.root}``, the
value of another option, is fine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vl3train.config.input.words import read_yaml
from vl3train.config.problems import Problem

WAY_OUT = "write the value itself; on the command line the shell fills in run.output_dir=$HOME/runs"


def resolver_problems(values: Sequence[tuple[str, Any]]) -> list[Problem]:
    """Options by their full names that hold a resolver, also inside lists and dicts."""
    return [
        Problem(key, text, "calls a function, and options hold values only", WAY_OUT)
        for key, value in values
        for text in _texts(value)
        if has_resolver(text)
    ]


def file_problems(file: Path) -> list[Problem]:
    """The same of a user's own file, its ``defaults`` included; none where it cannot be read, which Hydra will say."""
    try:
        content, _ = read_yaml(file)
    except (OSError, yaml.YAMLError):
        return []
    return resolver_problems([(str(file), content)])


def has_resolver(text: str) -> bool:
    """Whether OmegaConf would call a function for it: ``${NAME:...}``, where NAME may hold ``${...}`` itself.

    >>> has_resolver("${oc.env:HOME}"), has_resolver("a/${${name}:x}"), has_resolver("${data.root}/a:b")
    (True, True, False)
    """
    start = text.find("${")
    if start < 0:
        return False
    depth = 0
    for at in range(start, len(text)):
        if text.startswith("${", at):
            depth += 1
        elif text[at] == "}":
            depth = max(0, depth - 1)
        elif text[at] == ":" and depth:
            return True
    return False


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
