"""From YAML files and ``key=value`` to a TrainConfig, with all mistakes reported at once.

Hydra composes the groups. We then set the user's values one at a time, so that each mistyped one can be named
instead of only the first. A value replaces what was there, dicts and lists too:
``stage.learning_rates={projector: 1e-3}`` trains the projector only.
"""

from __future__ import annotations

import copy
import re
import typing
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vl3train.config.input.groups import GROUPS, group_choices, resolve_choice
from vl3train.config.input.options import OPTIONS, RENAMED, choices_of, kind_of, suggest
from vl3train.config.input.rates import (
    drop_frozen,
    frozen_as_zero,
    parts_by_stage,
    spread_one_rate,
    train_adapters_only,
    two_rates,
)
from vl3train.config.input.resolvers import file_problems, resolver_problems
from vl3train.config.input.user_input import UserInput
from vl3train.config.input.words import leaves, read_yaml, takes_text, with_text
from vl3train.config.paths import shipped_folder
from vl3train.config.problems import ConfigError, Problem, counted, show
from vl3train.config.rules import problems
from vl3train.config.schema import TrainConfig

NOT_SET = "???"


def add_config_arguments(parser: ArgumentParser) -> None:
    """The arguments of every command that takes a config."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="a choice of a group (stage=1, model=2b) or the value of an option (step.max_tokens=8192)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML file of choices and options; what you write as key=value replaces what it says",
    )
    parser.add_argument(
        "--config-dir",
        type=Path,
        metavar="DIR",
        help="folder with groups of your own, as DIR/stage/5_mine.yaml",
    )


def load_config(
    overrides: Sequence[str],
    *,
    config_file: Path | None = None,
    config_dir: Path | None = None,
    dp_size: int | None = None,
) -> TrainConfig:
    """The config that ``overrides`` (``group=choice``, ``key=value``) make.

    The content of the recipe is not checked: see preview/check_config.py.

    Args:
        overrides: they replace what ``config_file`` says.
        config_file: YAML with ``group: choice`` and ``group: {key: value}``, such as a run's ``config.yaml``. It
            replaces what the groups say.
        config_dir: holds groups of the user's own.
        dp_size: number of ranks, in place of machine.dp_size.

    Raises:
        ConfigError: names every mistake.
    """
    cfg, found = read_config(overrides, config_file=config_file, config_dir=config_dir, dp_size=dp_size)
    found = [*found, *(problems(cfg) if cfg is not None else [])]
    if cfg is None or found:
        raise ConfigError(found)
    return cfg


def read_config(
    overrides: Sequence[str],
    *,
    config_file: Path | None = None,
    config_dir: Path | None = None,
    dp_size: int | None = None,
) -> tuple[TrainConfig | None, list[Problem]]:
    """The config, and every mistake in the way it was written; None when it cannot be put together.

    A mistyped value leaves the composed value in place, so that the other rules can still be checked: whoever
    calls this refuses to run as long as anything was found.

    Args:
        overrides, config_file, config_dir: as in ``load_config``.
        dp_size: number of ranks that the launch really has; it replaces machine.dp_size.
    """
    user = UserInput()
    if config_dir is not None and not config_dir.is_dir():
        user.problems.append(
            Problem("--config-dir", config_dir, "no such folder", "name one that holds groups")
        )
        config_dir = None
    if config_file is not None:
        user.add_file(config_file)
    has_stage = any(key.startswith("stage.") for key, _ in user.values)
    in_file = len(user.values)
    for text in overrides:
        user.add_override(text)
    by_stage = parts_by_stage(user.values[:in_file], user.values[in_file:])
    user.problems += two_rates(user.values[in_file:])
    whole = _resolve_choices(user, config_dir, has_stage)
    base = _compose(user.choices, config_dir, user.problems)
    if base is None:
        whole, base = False, OmegaConf.structured(TrainConfig)
    if called := resolver_problems(user.values):
        whole = False  # nothing is resolved: the problems of other rules would show what it gives
        user.problems += called
    OmegaConf.set_struct(base, False)  # so that entries can be added to learning_rates, and removed
    if dp_size is not None:
        _set_ranks(user, dp_size)
    for key, value in user.values:
        problem = _set_option(base, key, value)
        if problem is not None:
            user.problems.append(problem)
    for part in by_stage & set(OmegaConf.select(base, "model.learning_rates") or {}):
        del base.model.learning_rates[part]
    if whole:
        drop_frozen(base)
        train_adapters_only(base, user.values[:in_file], user.values[in_file:])
        spread_one_rate(base, user.values[:in_file], user.values[in_file:])
    return (_as_objects(base, user.problems) if whole else None), user.problems


def _resolve_choices(user: UserInput, config_dir: Path | None, has_stage: bool) -> bool:
    """Full names in place of short ones; False when no stage is left.

    ``has_stage``: the user's file holds the options of a stage, so that none need be chosen.
    """
    whole = True
    for group in GROUPS:
        if group in user.choices:
            user.choices[group], problem = resolve_choice(group, user.choices[group], config_dir)
            if problem is not None:
                user.problems.append(problem)
                del user.choices[group]
                whole = whole and group != "stage"
    if whole and "stage" not in user.choices and not has_stage:
        way_out = f"choose one of {', '.join(group_choices('stage', config_dir))}"
        user.problems.append(Problem("stage", None, "no stage is chosen", way_out))
        whole = False
    return whole


def _compose(choices: Mapping[str, str], config_dir: Path | None, found: list[Problem]) -> DictConfig | None:
    """The groups put together; None when their files cannot be, with the reason in ``found``."""
    words = [f"{group}='{choice}'" for group, choice in choices.items()]  # quoted: 2024_10_01 is a name too
    if "stage" not in choices:
        words.append("~stage")
    if config_dir is not None:
        words.append(f"hydra.searchpath=['file://{config_dir.resolve()}']")
        own = [config_dir / group / f"{choice}.yaml" for group, choice in choices.items()]
        if called := [problem for file in own for problem in file_problems(file)]:
            found += called
            return None
    try:
        # The files of a user may change while this process runs: they are read each time.
        composed = _merged(words) if config_dir is not None else copy.deepcopy(_merged_shipped(tuple(words)))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        # Hydra says which file, then why ("Key 'x' not in 'StageConfig'"), then full_key.
        text = " ".join(str(error).split())
        named = re.search(r"(.*) full_key: (\S+)", text)
        what, key = (named[1], named[2]) if named else (text, "configs")
        found.append(Problem(key, "", what, suggest(key) if named else "correct the file"))
        return None
    read: Any = OmegaConf.to_container(composed, resolve=False)
    if called := resolver_problems([leaf for key, value in read.items() for leaf in leaves(key, value)]):
        found += called  # of a file that a chosen one names
        return None
    if config_dir is not None:
        for group, choice in choices.items():
            _keep_text(composed, config_dir / group / f"{choice}.yaml", group)
    return composed


def _merged(words: Sequence[str]) -> DictConfig:
    """The files of the groups that ``words`` choose, one over the other. Raises what Hydra and OmegaConf raise."""
    ConfigStore.instance().store(name="schema", node=TrainConfig)
    with initialize_config_dir(config_dir=str(shipped_folder("configs")), version_base="1.3"):
        return compose("train", overrides=list(words))


@lru_cache(256)
def _merged_shipped(words: tuple[str, ...]) -> DictConfig:
    """As ``_merged``, of shipped files alone. Hydra takes 0.2 s, a copy 0.01 s: callers copy it before a change."""
    return _merged(words)


def _keep_text(composed: DictConfig, file: Path, group: str) -> None:
    """Put back the words of a user's own group file that Hydra turned into numbers and then into other words."""
    if not file.is_file():
        return
    content, words = read_yaml(file)
    whole = "@package _global_" in file.read_text(encoding="utf-8").partition("\n")[0]
    prefix = "" if whole else f"{group}."
    read = dict(leaf for key, value in content.items() for leaf in leaves(f"{prefix}{key}", value))
    for key, value in with_text(content, words, prefix):
        if value is not read[key] and OmegaConf.select(composed, key) == str(read[key]):
            OmegaConf.update(composed, key, value)


def _set_ranks(user: UserInput, dp_size: int) -> None:
    """The number of ranks is the launch's; another one that the user wrote is a mistake."""
    what, way_out = f"the launch has {counted(dp_size, 'rank')}", "leave it out: the launch decides"
    user.problems += [
        Problem("machine.dp_size", value, what, way_out)
        for key, value in user.values
        if key == "machine.dp_size" and value != dp_size
    ]
    user.values.append(("machine.dp_size", dp_size))


def _set_option(cfg: DictConfig, key: str, value: Any) -> Problem | None:
    """Set one option in ``cfg``, or say why it cannot be set."""
    owner = key.lstrip("~").rpartition(".")[0]
    in_dict = typing.get_origin(OPTIONS.get(owner)) is dict
    if key.startswith("~"):
        name = key[1:].rpartition(".")[2]
        node = OmegaConf.select(cfg, owner) if in_dict else None
        if node is None or name not in node:
            return Problem(key, "", "only an entry of a dict that is there can be removed", suggest(key[1:]))
        del node[name]
        return None
    if key in RENAMED:
        return Problem(key, value, f"was renamed to {RENAMED[key]}", f"write {RENAMED[key]}={show(value)}")
    if key not in OPTIONS and not in_dict:
        return Problem(key, value, "no such option", suggest(key))
    if takes_text(key) and isinstance(value, (int, float)):
        # Inside {...} of the command line Hydra has read a number or a bool; how it was written is lost.
        return Problem(key, value, "was read as a number or a word of YAML", f"write {key}=TEXT, or quote it")
    try:
        OmegaConf.update(cfg, key, frozen_as_zero(key, value), merge=False, force_add=True)
    except OmegaConfBaseException:
        hint = OPTIONS.get(key, float)
        if isinstance(value, str) and (words := choices_of(hint)):
            return Problem(key, value, "no such choice", f"there are: {', '.join(words)}")
        return Problem(key, value, "is of the wrong kind", f"it takes {kind_of(hint)}")
    return None


def _as_objects(base: DictConfig, found: list[Problem]) -> TrainConfig | None:
    """Typed objects; None when a value is missing, with the reason in ``found``."""
    plain = OmegaConf.to_container(base, resolve=False)
    assert isinstance(plain, dict)
    unset = [key for key in OPTIONS if plain[key.partition(".")[0]][key.partition(".")[2]] == NOT_SET]
    found += [Problem(key, "", "must be set", f"add {key}=VALUE, {kind_of(OPTIONS[key])}") for key in unset]
    if unset:
        return None
    try:
        cfg = OmegaConf.to_object(base)
    except OmegaConfBaseException as error:
        what = str(error).strip().partition("\n")[0] or type(error).__name__
        found.append(Problem(str(error.full_key), NOT_SET, what, "write the value out"))
        return None
    assert isinstance(cfg, TrainConfig)
    return cfg
