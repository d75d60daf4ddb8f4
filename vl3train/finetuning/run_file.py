"""run.yaml: all options of a fine-tuning in one file, to read, to edit, and to start again."""

from __future__ import annotations

import hashlib
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vl3train.config.input.groups import GROUPS
from vl3train.config.input.meanings import meanings
from vl3train.config.input.user_input import UserInput
from vl3train.contracts.files import write_whole

RUN_FILE = "run.yaml"
SIGNED = "# written by vl3train finetune: "
"""The last line: a digest of what is above, which tells a file that a person has changed."""


def with_overrides(options: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Options with what the person wrote as key=value, which is known to be right."""
    user = UserInput()
    for text in overrides:
        user.add_override(text)
    merged = {**options, **user.choices}
    for key, value in user.values:
        if key.startswith("~"):
            merged[key[1:]] = None  # a removed rate: null freezes the part
            continue
        for below in [name for name in merged if name.startswith(f"{key}.")]:
            del merged[below]
        owner, _, name = key.rpartition(".")
        if isinstance(merged.get(owner), dict):
            merged[owner] = {**merged[owner], name: value}
        else:
            merged[key] = value
    return merged


def run_text(options: Mapping[str, Any], words: Sequence[str], out: Path) -> str:
    """run.yaml: choices of groups, then options by section, each with the first sentence of its meaning."""
    file = shlex.quote(str(out / RUN_FILE))
    lines = [
        f"# vl3train finetune {shlex.join(words)}",
        "#",
        "# Change what you like, and start it again:",
        f"#   vl3train finetune --config {file}",
        f"# The training alone, of the data that are made: vl3train train --config {file}",
        "# `vl3train options WORD` tells what else there is; options may be nested, or have dots as here.",
        "",
        *(f"{group}: {options[group]}" for group in GROUPS if group in options),
    ]
    section, known = "", meanings()
    for key, value in sorted(options.items(), key=lambda item: _place(item[0])):
        if key in GROUPS:
            continue
        if (own := key.partition(".")[0]) != section:
            section = own
            lines.append("")
        if key in known:
            lines.append(
                textwrap.shorten(f"# {_first_sentence(known[key].meaning)}", 118, placeholder=" ...")
            )
        lines.append(f"{key}: {_as_yaml(value)}")
    text = "\n".join(lines) + "\n"
    return f"{text}{SIGNED}{_digest(text)}\n"


def _place(key: str) -> int:
    """The place of an option in the schema; an entry of a dict stands at its dict's."""
    order = list(meanings())
    return next((order.index(name) for name in (key, key.rpartition(".")[0]) if name in order), len(order))


def _first_sentence(meaning: str) -> str:
    return meaning.partition(". ")[0].removesuffix(".") + "."


def _as_yaml(value: Any) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
        .removesuffix("...\n")
        .strip()
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_run_file(out: Path, text: str, *, has_begun: bool) -> None:
    """Write run.yaml in place of one that this command wrote and nobody changed since.

    Raises:
        ValueError: the file that is there says otherwise, and a person changed it, or a run has begun with it.
    """
    file = out / RUN_FILE
    if file.is_file():
        there = file.read_text(encoding="utf-8")
        different = differing(there, text)
        if not different:
            return
        if has_begun or not is_as_written(there):
            why = "a training has begun with it" if has_begun else "it was changed since it was written"
            raise ValueError(
                "\n".join(
                    [
                        f"{file} says otherwise than this command, and {why}:",
                        *(f"  {line}" for line in different),
                        f"to go on with the file: vl3train finetune --config {shlex.quote(str(file))}; to begin anew, "
                        "give another --out, or delete that folder",
                    ]
                )
            )
    write_whole(file, text)


def is_as_written(text: str) -> bool:
    """Whether nobody changed a run.yaml since it was written."""
    above, signed, digest = text.rpartition(SIGNED)
    return bool(signed) and digest.strip() == _digest(above)


def differing(there: str, here: str) -> list[str]:
    """Options that two files give other values, a line each; comments do not count."""
    try:
        one, other = yaml.safe_load(there), yaml.safe_load(here)
    except yaml.YAMLError:
        return ["the file is not YAML"]
    one = one if isinstance(one, dict) else {}
    return [
        f"{key}: {_as_yaml(one.get(key, 'unset'))} in the file, {_as_yaml(other.get(key, 'unset'))} in the command"
        for key in dict.fromkeys([*one, *other])
        if one.get(key, "unset") != other.get(key, "unset")
    ]
