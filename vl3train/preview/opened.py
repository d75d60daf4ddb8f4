"""A config and its indexed data, for the commands that look before a run starts."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vl3train.config.load import load_config
from vl3train.config.paths import resolve_weights
from vl3train.config.schema import TrainConfig

if TYPE_CHECKING:
    from vl3train.data.pipeline import OpenData


@contextmanager
def opened(args: Namespace) -> Iterator[tuple[TrainConfig, OpenData]]:
    """The config that the arguments make, and its training samples, which must be indexed.

    Raises:
        ValueError: the config, the recipe or an index cannot be used; the message says the way out.
    """
    from vl3train.data.pipeline import open_data
    from vl3train.model.weights.processor import build_processor

    cfg = load_config(args.overrides, config_file=args.config, config_dir=args.config_dir)
    with tempfile.TemporaryDirectory() as folder:
        # The tokenizer exactly as a run writes it: the index carries its checksum.
        build_processor(tokenizer_source(cfg)).save_pretrained(folder)
        yield cfg, open_data(cfg, tokenizer_dir=Path(folder), held_out=False, build=False)


def split_step(overrides: list[str]) -> tuple[list[str], int | None]:
    """Overrides without ``step=N``, which here names a step of the run and no section of the config; and N.

    >>> split_step(["stage=1", "step=12", "step.fill=0.9"])
    (['stage=1', 'step.fill=0.9'], 12)
    """
    numbers = [word[5:] for word in overrides if word.startswith("step=") and word[5:].isdigit()]
    rest = [word for word in overrides if not (word.startswith("step=") and word[5:].isdigit())]
    return rest, int(numbers[-1]) if numbers else None


def tokenizer_source(cfg: TrainConfig) -> str | Path:
    """Folder or hub name of the tokenizer a run with this config takes."""
    if cfg.model.tokenizer_from is not None:
        return cfg.model.tokenizer_from
    if cfg.stage.init_from is not None:
        return resolve_weights(cfg.stage.init_from)
    assert cfg.model.language_model_from is not None, "config rules refuse a run without a tokenizer"
    return cfg.model.language_model_from
