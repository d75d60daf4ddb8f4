"""What a user wrote, in a YAML file and as ``key=value``, sorted into choices of groups and values of options."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from vl3train.config.input.groups import GROUPS
from vl3train.config.input.options import WRITTEN_BY_RUNS, by_present_names
from vl3train.config.input.words import changes_text, leaves, read_yaml, with_text
from vl3train.config.problems import Problem

SEVERAL = "give one, or let `vl3train train -m` train a run with each; a list is [a,b]"


@dataclass(slots=True)
class UserInput:
    """Choices and values in the order they were written, and every mistake in the writing.

    A value under the key ``~section.option.entry`` removes that entry.
    """

    choices: dict[str, str] = field(default_factory=dict)
    values: list[tuple[str, Any]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def add_file(self, file: Path) -> None:
        """Add what a YAML file says."""
        try:
            content, words = read_yaml(file)
        except OSError as error:
            self._reject("--config", file, f"cannot be read: {error.strerror}", "name a YAML file")
            return
        except yaml.YAMLError as error:
            self._reject("--config", file, "is not YAML", " ".join(str(error).split()))
            return
        if not isinstance(content, dict):
            way_out = "write `stage: 1` or `step: {max_tokens: 8192}` in it"
            self._reject("--config", file, "holds no options", way_out)
            return
        if all(isinstance(content.get(section), Mapping) for section in WRITTEN_BY_RUNS):
            # Only a run writes every section out: its config.yaml may be that of an earlier build.
            content, words = by_present_names(content), by_present_names(words)
        for key, value in with_text(content, words):
            if key in GROUPS:
                self.choices[key] = str(words[key])
            else:
                self.values.append((key, value))

    def add_override(self, text: str) -> None:
        """Add one ``key=value`` of the command line."""
        try:
            override = OverridesParser.create().parse_override(text)
        except (HydraException, ValueError):  # ValueError: a number of thousands of digits
            self._reject(text, "", "is not key=value", _intended(text))
            return
        key = override.key_or_group
        if override.is_sweep_override():
            self._reject(key, text.partition("=")[2], "is several values", SEVERAL)
            return
        if override.is_delete():
            self.values.append((f"~{key}", None))
            return
        value, written = override.value(), text.partition("=")[2].strip()
        if key in GROUPS and not isinstance(value, dict):
            self.choices[key] = value if isinstance(value, str) else written
        else:
            self.values.extend(leaves(key, written if changes_text(key, value) else value))

    def _reject(self, key: str, value: object, what: str, way_out: str) -> None:
        self.problems.append(Problem(key, value, what, way_out))


def _intended(text: str) -> str:
    """The way out of a word that is not key=value."""
    if os.path.isdir(text):  # pathlib raises where the text is longer than a name may be
        return f"say what it is: data.root={text} has shards, stage.init_from={text} is a checkpoint"
    if os.path.isfile(text):
        return (
            f"say what it is: data.recipe={text} names sources, --config {text} is a file of options that "
            "replace those of the groups"
        )
    return "quote what the shell or YAML would read otherwise, as in 'key=\"a b\"'"
