"""Every option in words: what it takes, its default, its meaning, and the shipped files that set it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml
from omegaconf import MISSING

from vl3train.config.input.groups import GROUPS
from vl3train.config.input.options import OPTIONS, SECTIONS, kind_of
from vl3train.config.input.words import leaves
from vl3train.config.paths import shipped_folder
from vl3train.config.problems import show


@dataclass(frozen=True, slots=True)
class Meaning:
    """One option in words."""

    key: str
    takes: str
    default: str
    meaning: str
    set_by: tuple[str, ...]
    """Choices of groups that set it, as ``stage=4_video_finetuning``."""


@cache
def meanings() -> dict[str, Meaning]:
    """Every option by its full name, in the order of the schema."""
    set_by: dict[str, list[str]] = {}
    for choice, key in _set_by_files():
        set_by.setdefault(key, []).append(choice)
    found = {}
    for section, factory in SECTIONS.items():
        cls: Any = factory
        texts = _texts(cls)
        for option in dataclasses.fields(cls):
            key = f"{section}.{option.name}"
            found[key] = Meaning(
                key,
                kind_of(OPTIONS[key]),
                _default_of(option),
                texts[option.name],
                tuple(set_by.get(key, ())),
            )
    return found


def _texts(cls: type) -> dict[str, str]:
    """The text below each field of a config class, in one line each."""
    [node] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    return {
        ast.unparse(option.target): " ".join(str(after.value.value).split())
        for option, after in zip(node.body, node.body[1:], strict=False)
        if isinstance(option, ast.AnnAssign)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }


def _default_of(option: dataclasses.Field[Any]) -> str:
    """A field's default as a user writes it; none where the option must be set."""
    if option.default_factory is not dataclasses.MISSING:
        value = option.default_factory()
        return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
    return "MUST BE SET" if option.default == MISSING else show(option.default)


def _set_by_files() -> Iterator[tuple[str, str]]:
    """Choices of shipped groups, and each option that they set."""
    for group in GROUPS:
        for file in sorted((shipped_folder("configs") / group).glob("*.yaml")):
            text = file.read_text(encoding="utf-8")
            prefix = "" if "@package _global_" in text.partition("\n")[0] else f"{group}."
            for key, value in (yaml.safe_load(text) or {}).items():
                for name, _ in leaves(f"{prefix}{key}", value):
                    yield f"{group}={file.stem}", name
