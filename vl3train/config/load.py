"""Hydra's only door: from YAML files and ``key=value`` to a TrainConfig, with all mistakes told at once.

Hydra composes the groups; values are laid over them here, one at a time, so that each mistyped one can be
named instead of only the first. A value replaces what stood there, dicts and lists too:
``stage.learning_rates={projector: 1e-3}`` trains the projector only.
"""

from __future__ import annotations

import difflib
import os
import re
import typing
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vl3train.config.options import GROUPS, OPTIONS, RENAMED, SECTIONS, kind_of, suggest
from vl3train.config.paths import shipped_folder
from vl3train.config.plain import as_plain
from vl3train.config.problems import ConfigError, Problem, show
from vl3train.config.rules import problems
from vl3train.config.schema import TrainConfig

NOT_SET = "???"


def load_config(
    overrides: Sequence[str],
    *,
    config_file: Path | None = None,
    config_dir: Path | None = None,
) -> TrainConfig:
    """The config that ``overrides`` (``group=choice``, ``key=value``) make; ConfigError names every mistake.

    ``config_file`` is laid over the groups before the overrides: YAML with ``group: choice`` and ``group:
    {key: value}``; the ``config.yaml`` of a run is one. ``config_dir`` holds groups of the user's own.
    What the recipe holds is not looked into: see cli/check.py.
    """
    cfg, found = read_config(overrides, config_file=config_file, config_dir=config_dir)
    found = [*found, *(problems(cfg) if cfg is not None else [])]
    if cfg is None or found:
        raise ConfigError(found)
    return cfg


def save_config(cfg: TrainConfig, file: Path) -> None:
    """Write every option of ``cfg`` as YAML that ``load_config(config_file=...)`` reads."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(yaml.safe_dump(as_plain(cfg), sort_keys=False, allow_unicode=True))
    partial.replace(file)


def load_run_config(run_folder: str | Path) -> TrainConfig:
    """The config of an earlier run, from its output folder. What it started from may be gone by now."""
    file = Path(run_folder) / "config.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {run_folder} is no run's output folder")
    cfg, found = read_config([], config_file=file)
    if cfg is None or found:
        raise ConfigError(found)
    return cfg


def add_config_arguments(parser: ArgumentParser) -> None:
    """The arguments of every command that takes a config."""
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="stage=1 model=2b step.max_tokens=8192"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML laid over the groups")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="folder with groups of your own")


def read_config(
    overrides: Sequence[str],
    *,
    config_file: Path | None = None,
    config_dir: Path | None = None,
    dp_size: int | None = None,
) -> tuple[TrainConfig | None, list[Problem]]:
    """The config and what is wrong with the way it was written; None when it cannot be put together.

    ``dp_size`` is the number of ranks that the launch really has; it takes the place of machine.dp_size.
    """
    found: list[Problem] = []
    choices: dict[str, str] = {}
    values: list[tuple[str, Any]] = []
    if config_dir is not None and not config_dir.is_dir():
        found.append(Problem("--config-dir", config_dir, "no such folder", "name one that holds groups"))
        config_dir = None
    if config_file is not None:
        _read_file(config_file, choices, values, found)
    has_stage = any(key.startswith("stage.") for key, _ in values)
    for text in overrides:
        _read_override(text, choices, values, found)

    whole = True
    for group in GROUPS:
        if group in choices:
            choices[group], problem = _resolve_choice(group, choices[group], config_dir)
            if problem is not None:
                found.append(problem)
                del choices[group]
                whole = whole and group != "stage"
    if whole and "stage" not in choices and not has_stage:
        way_out = f"choose one of {', '.join(group_choices('stage', config_dir))}"
        found.append(Problem("stage", None, "no stage is chosen", way_out))
        whole = False

    base = _compose(choices, config_dir, found)
    if base is None:
        whole, base = False, OmegaConf.structured(TrainConfig)
    OmegaConf.set_struct(base, False)  # so that learning_rates take and lose entries
    if dp_size is not None:
        found += [
            Problem(
                "machine.dp_size",
                value,
                f"the launch has {dp_size} ranks",
                "leave it out: the launch decides",
            )
            for key, value in values
            if key == "machine.dp_size" and value != dp_size
        ]
        values.append(("machine.dp_size", dp_size))
    for key, value in values:
        problem = _lay_over(base, key, value)
        if problem is not None:
            found.append(problem)
    if not whole:
        return None, found
    plain = OmegaConf.to_container(base, resolve=False)
    assert isinstance(plain, dict)
    unset = [key for key in OPTIONS if plain[key.partition(".")[0]][key.partition(".")[2]] == NOT_SET]
    found += [Problem(key, "", "must be set", f"add {key}=VALUE, {kind_of(OPTIONS[key])}") for key in unset]
    if unset:
        return None, found
    try:
        cfg = OmegaConf.to_object(base)
    except OmegaConfBaseException as error:
        found.append(Problem(str(error.full_key), NOT_SET, _first_line(error), "write the value out"))
        return None, found
    assert isinstance(cfg, TrainConfig)
    # A mistyped value leaves the composed one standing, so that the other rules can still be checked; the
    # caller refuses to run as long as anything was found.
    return cfg, found


def group_choices(group: str, config_dir: Path | None = None) -> list[str]:
    """Names that ``group=...`` accepts."""
    folders = [shipped_folder("configs") / group, *([config_dir / group] if config_dir else [])]
    return sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})


def _resolve_choice(group: str, choice: str, config_dir: Path | None) -> tuple[str, Problem | None]:
    """The full name of a choice: ``stage=1`` means the one that begins with ``1_``."""
    names = group_choices(group, config_dir)
    if choice in names:
        own = config_dir is not None and (config_dir / group / f"{choice}.yaml").is_file()
        if own and (shipped_folder("configs") / group / f"{choice}.yaml").is_file():
            what = f"{config_dir}/{group}/{choice}.yaml has the name of a file that ships with vl3train"
            return choice, Problem(group, choice, what, "give yours another name")
        return choice, None
    begun = [name for name in names if name.startswith(f"{choice}_")]
    if len(begun) == 1:
        return begun[0], None
    likely = difflib.get_close_matches(choice, names, n=1, cutoff=0.5)
    way_out = f"did you mean {likely[0]}? " if likely else ""
    return choice, Problem(group, choice, "no such choice", f"{way_out}there is {', '.join(names)}")


def _compose(choices: Mapping[str, str], config_dir: Path | None, found: list[Problem]) -> DictConfig | None:
    """The groups put together; None when their files cannot be, with the reason in ``found``."""
    ConfigStore.instance().store(name="schema", node=TrainConfig)
    words = [f"{group}={choice}" for group, choice in choices.items()]
    if "stage" not in choices:
        words.append("~stage")
    if config_dir is not None:
        words.append(f"hydra.searchpath=['file://{config_dir.resolve()}']")
    try:
        with initialize_config_dir(config_dir=str(shipped_folder("configs")), version_base="1.3"):
            return compose("train", overrides=words)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        # Hydra says which file, then why ("Key 'x' not in 'StageConfig'"), then full_key.
        text = " ".join(str(error).split())
        named = re.search(r"(.*) full_key: (\S+)", text)
        what, key = (named[1], named[2]) if named else (text, "configs")
        found.append(Problem(key, "", what, suggest(key) if named else "correct the file"))
        return None


def _read_file(
    file: Path, choices: dict[str, str], values: list[tuple[str, Any]], found: list[Problem]
) -> None:
    """Sort the content of a user's YAML file into choices and values."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(file))
    except OSError as error:
        found.append(Problem("--config", file, f"cannot be read: {error.strerror}", "name a YAML file"))
        return
    except yaml.YAMLError as error:
        found.append(Problem("--config", file, "is not YAML", " ".join(str(error).split())))
        return
    if not isinstance(content, dict):
        what = "holds no options"
        found.append(Problem("--config", file, what, "write `stage: 1` or `step: {max_tokens: 8192}` in it"))
        return
    for key, value in content.items():
        if key in GROUPS and not isinstance(value, Mapping):
            choices[key] = str(value)
        else:
            values.extend(_leaves(str(key), value))


def _read_override(
    text: str, choices: dict[str, str], values: list[tuple[str, Any]], found: list[Problem]
) -> None:
    """Sort one ``key=value`` of the command line into choices and values."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        way_out = "quote what the shell or YAML would read otherwise, as in 'key=\"a b\"'"
        if os.path.isdir(text):  # pathlib raises where the text is longer than a name may be
            way_out = f"say what it is: data.root={text} has shards, stage.init_from={text} is a checkpoint"
        elif os.path.isfile(text):
            way_out = f"say what it is: data.recipe={text} names sources, --config {text} lays options over the groups"
        found.append(Problem(text, "", "is not key=value", way_out))
        return
    key = override.key_or_group
    if override.is_sweep_override():
        found.append(Problem(key, text.partition("=")[2], "is several values", "give one; a list is [a,b]"))
    elif override.is_delete():
        values.append((f"~{key}", None))
    elif key in GROUPS and not isinstance(override.value(), dict):
        choices[key] = str(override.value())
    else:
        values.extend(_leaves(key, override.value()))


def _leaves(key: str, value: Any) -> list[tuple[str, Any]]:
    """Options below a section, by their full names; an option that is itself a dict stays whole."""
    if isinstance(value, Mapping) and (key in SECTIONS or key not in OPTIONS):
        return [leaf for name, item in value.items() for leaf in _leaves(f"{key}.{name}", item)]
    return [(key, value)]


def _lay_over(cfg: DictConfig, key: str, value: Any) -> Problem | None:
    """Set one option in ``cfg``, or say why it cannot be."""
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
    try:
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    except OmegaConfBaseException:
        return Problem(key, value, "is of the wrong kind", f"it takes {kind_of(OPTIONS.get(key, float))}")
    return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
