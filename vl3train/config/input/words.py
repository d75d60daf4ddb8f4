"""Text options stay the text that was written: ``run.output_dir=2024_10_01`` is a folder, and no number."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from vl3train.config.input.options import OPTIONS, SECTIONS


class _Words(yaml.SafeLoader):
    """YAML with words only: 2024_10_01, 010 and true stay what was written. Of null there are ``~`` and nothing."""


_Words.yaml_implicit_resolvers = {}
_Words.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("~|$"), ["~", ""])
_Words.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("<<$"), ["<"])


def read_yaml(file: Path) -> tuple[Any, Any]:
    """The content of a YAML file, read as usual, and again with every scalar as it is written.

    Raises:
        OSError: the file cannot be read.
        yaml.YAMLError: it is not YAML.
    """
    content = OmegaConf.to_container(OmegaConf.load(file))
    return content, yaml.load(file.read_text(encoding="utf-8"), _Words)


def takes_text(key: str) -> bool:
    """Whether an option is text: a path or a name."""
    return OPTIONS.get(key) in (str, str | None)


def changes_text(key: str, value: Any) -> bool:
    """Whether an option is text, and what was written for it was read as a number, a bool, or a null it cannot be."""
    may_be_null = type(None) in typing.get_args(OPTIONS.get(key))
    return takes_text(key) and (isinstance(value, (int, float)) or (value is None and not may_be_null))


def with_text(
    content: Mapping[Any, Any], words: Mapping[Any, Any], prefix: str = ""
) -> list[tuple[str, Any]]:
    """Options in a YAML file's content by their full names; text options as they are written.

    Args:
        content, words: as ``read_yaml`` returns them.
        prefix: the section that the content belongs to, with its dot; empty where it names sections.
    """
    written = dict(leaf for key, value in words.items() for leaf in leaves(f"{prefix}{key}", value))
    return [
        (name, written.get(name, item) if changes_text(name, item) else item)
        for key, value in content.items()
        for name, item in leaves(f"{prefix}{key}", value)
    ]


def leaves(key: str, value: Any) -> list[tuple[str, Any]]:
    """Options below a section, by their full names; an option that is itself a dict stays whole."""
    if isinstance(value, Mapping) and (key in SECTIONS or key not in OPTIONS):
        return [leaf for name, item in value.items() for leaf in leaves(f"{key}.{name}", item)]
    return [(key, value)]
