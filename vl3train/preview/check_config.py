"""The config that the command line makes: checked together with its recipe, or opened with its indexed data."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vl3train.config.load import load_config, read_config
from vl3train.config.paths import tokenizer_source
from vl3train.config.problems import ConfigError, Problem, show
from vl3train.config.rules import problems
from vl3train.config.schema import TrainConfig
from vl3train.contracts.shapes import ENCODER, LANGUAGE_MODELS
from vl3train.data.recipe import Recipe, load_recipe, recipe_problems
from vl3train.model.adapter_targets import layers_of, target_pattern
from vl3train.model.weights.headers.start import weights_problems

if TYPE_CHECKING:
    from vl3train.data.pipeline import OpenData


def check_config(args: Namespace, dp_size: int | None = None) -> TrainConfig:
    """The config of a run that may start: for commands that took add_config_arguments.

    ``dp_size`` is the number of ranks that the launch has; a machine.dp_size that says another is refused.
    Raises ConfigError with everything that is wrong, also with the recipe.
    """
    cfg, _, found = examine(args, dp_size)
    if cfg is None or found:
        raise ConfigError(found)
    return cfg


def examine(
    args: Namespace, dp_size: int | None = None
) -> tuple[TrainConfig | None, Recipe | None, list[Problem]]:
    """The config, its recipe, and all that is wrong with either."""
    cfg, found = read_config(
        args.overrides, config_file=args.config, config_dir=args.config_dir, dp_size=dp_size
    )
    if cfg is None:
        return None, None, found
    recipe, in_recipe = check_recipe(cfg)
    found = [*found, *problems(cfg)]
    in_weights = weights_problems(cfg, {problem.key for problem in found})
    in_adapters = [] if {problem.key.partition(".")[0] for problem in found} & {"adapter"} else targets(cfg)
    return cfg, recipe, [*found, *in_adapters, *in_weights, *in_recipe]


def targets(cfg: TrainConfig) -> list[Problem]:
    """Patterns of adapter.target_modules that match no layer; a model of unknown sizes passes for a deep one."""
    shape = LANGUAGE_MODELS.get(cfg.model.name)
    deep = [replace(tower, num_layers=999) for tower in (LANGUAGE_MODELS["2b"], ENCODER)]
    language, encoder = (shape, ENCODER) if shape is not None else deep
    names = [name for tower in (language, encoder) for name, *_ in layers_of(tower)]
    try:
        target_pattern(names, cfg.adapter)
    except ValueError as error:
        return [Problem("adapter.target_modules", show(cfg.adapter.target_modules), str(error), "")]
    return []


def check_recipe(cfg: TrainConfig) -> tuple[Recipe | None, list[Problem]]:
    """The recipe the run would read, and what is wrong with it."""
    name = cfg.data.recipe or cfg.stage.recipe
    try:
        recipe = load_recipe(name, cfg.data.root)
    except ValueError as error:
        return None, [Problem("data.recipe", name, str(error).removeprefix(f"data.recipe={name}: "), "")]
    if not Path(cfg.data.root).expanduser().is_dir():
        return recipe, []  # data.root is a problem of its own; every source would be missing
    return recipe, [Problem("data.recipe", name, text, "") for text in recipe_problems(recipe, cfg.data.root)]


@contextmanager
def opened(args: Namespace, dp_size: int | None = None) -> Iterator[tuple[TrainConfig, OpenData]]:
    """The config that the arguments make, and its training samples, which must be indexed.

    ``dp_size`` is the number of ranks, in place of machine.dp_size.
    Raises ValueError when the config, the recipe or an index cannot be used; the message says what to do.
    """
    cfg = load_config(args.overrides, config_file=args.config, config_dir=args.config_dir, dp_size=dp_size)
    with opened_data(cfg) as data:
        yield cfg, data


@contextmanager
def opened_data(cfg: TrainConfig) -> Iterator[OpenData]:
    """The training samples of a config, which must be indexed. Raises ValueError where an index cannot be used."""
    from vl3train.data.pipeline import open_data
    from vl3train.model.weights.processor import build_processor

    with tempfile.TemporaryDirectory() as folder:
        # The tokenizer exactly as a run writes it: the index carries its checksum.
        build_processor(tokenizer_source(cfg)).save_pretrained(folder)
        yield open_data(cfg, tokenizer_dir=Path(folder), held_out=False, build=False)


def indexed_steps(cfg: TrainConfig, recipe: Recipe) -> tuple[int, int] | None:
    """Steps of the run and of its first virtual epoch; None where no index fits its samples and settings.

    Imports torch and transformers only where there are indexes.
    """
    if not any(has_index(source.shards, cfg.data.index_dir) for source in recipe.sources if source.shards):
        return None
    try:
        with opened_data(cfg) as data:
            plan = data.plan
            return cfg.run.num_steps or plan.total_steps(cfg.run.num_epochs), plan.steps_in_epoch(0)
    except (OSError, ValueError):
        return None  # of other settings; `vl3train plan` says what differs


def has_index(shards: Path, index_dir: str | None) -> bool:
    """Whether a folder of shards has an index, of whatever settings."""
    if index_dir is None:
        return any(shards.glob("index-*"))
    return any(Path(index_dir).expanduser().glob(f"{shards.name}-*/index-*"))
