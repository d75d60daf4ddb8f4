"""The options that exist, read from the schema, and what each takes, in words."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from typing import Any

from vl3train.config.input.other_words import by_other_words, like_other_words
from vl3train.config.schema import TrainConfig

SECTIONS: dict[str, Any] = {section.name: section.default_factory for section in fields(TrainConfig)}
OPTIONS: dict[str, Any] = {
    f"{name}.{option}": hint
    for name, cls in SECTIONS.items()
    for option, hint in typing.get_type_hints(cls).items()
}
"""Type of every option, by its full name."""


WRITTEN_BY_RUNS = [name for name in SECTIONS if name != "finetune"]
"""Sections that the config.yaml of every run has, also of one of an earlier build."""

RENAMED = {
    "machine.states_on_host": "machine.offload_optimizer",
    "machine.products": "machine.gemm_backend",
    "data.max_bad_fraction": "data.max_failed_fraction",
    "data.max_consecutive_bad": "data.max_consecutive_failed",
}
"""Options by their former name. Whoever writes the former name gets the present one as the answer."""


def by_present_names(config: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    """Options that an earlier build wrote, by section, under the names they have now.

    >>> by_present_names({"data": {"max_consecutive_bad": 20, "fps": 1.0}})
    {'data': {'max_consecutive_failed': 20, 'fps': 1.0}}
    """
    return {
        section: {
            RENAMED.get(f"{section}.{name}", name).removeprefix(f"{section}."): value
            for name, value in options.items()
        }
        for section, options in config.items()
    }


def choices_of(hint: Any) -> list[str]:
    """The words that an option of this type takes; empty where it takes numbers or any text."""
    kinds = [one for one in (hint, *typing.get_args(hint)) if isinstance(one, type) and issubclass(one, Enum)]
    return [member.name for kind in kinds for member in kind]


def kind_of(hint: Any) -> str:
    """In words, what an option of this type takes."""
    arguments = typing.get_args(hint)
    if type(None) in arguments:
        return f"{kind_of(arguments[0])}, or null"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(member.name for member in hint)}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    origins = {dict: "numbers by name, as {projector: 1e-3}", list: "a list, as [a, b]"}
    return words.get(hint) or origins[typing.get_origin(hint)]


def suggest(key: str) -> str:
    """The way out of an unknown key: what is called so elsewhere, what is spelled like it, else what there is."""
    section, _, last = key.rpartition(".")
    last = last.replace("-", "_").strip("_").lower()
    named = [option for option in OPTIONS if option.partition(".")[2] == last]
    meant = [*named, *by_other_words(last)]
    if meant:
        return f"did you mean {' or '.join(meant)}?"
    if not section and (likely := difflib.get_close_matches(key, SECTIONS, n=1)):
        return f"did you mean {likely[0]}?"
    by_last = {option.partition(".")[2]: option for option in OPTIONS}
    likely = difflib.get_close_matches(key, OPTIONS, n=1, cutoff=0.75)
    likely = likely or [by_last[name] for name in difflib.get_close_matches(last, by_last, n=1, cutoff=0.75)]
    meant = likely[:1] or [*like_other_words(last)]
    if meant:
        return f"did you mean {' or '.join(meant)}?"
    known = [option.partition(".")[2] for option in OPTIONS if option.startswith(f"{section}.")]
    return f"{section} has {', '.join(known)}" if known else f"the sections are {', '.join(SECTIONS)}"
