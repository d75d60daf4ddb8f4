"""Compute loss and exact-match accuracy of a trained model on the held-out samples of a recipe, beside chance.

examples:
  vl3train evaluate runs/2b/4_video_finetuning                          the run's own recipe and newest checkpoint
  vl3train evaluate runs/2b/4_video_finetuning data.recipe=mine.yaml    held-out samples of another recipe
  vl3train evaluate runs/2b/4_video_finetuning --model export --json figures.json
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from vl3train.config.checks.start import start_problems
from vl3train.config.load import read_config
from vl3train.config.problems import ConfigError
from vl3train.config.rules import problems


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``vl3train evaluate``."""
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="a run's output folder; the command uses its config"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options, as data.recipe=mine.yaml")
    parser.add_argument(
        "--model", type=Path, help="evaluate another model: a run, a checkpoint or an export (default: RUN)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")


def main(args: Namespace) -> int:
    """Print the table; returns 0. Raises ValueError or OSError for a folder or recipe that cannot be used."""
    config_file = args.run / "config.yaml"
    if not config_file.is_file():
        raise FileNotFoundError(f"{config_file} is missing: {args.run} is not a run's output folder")
    cfg, found = read_config(args.overrides, config_file=config_file)
    if cfg is not None:  # what the run started from may be gone by now
        at_start = start_problems(cfg)
        found += [problem for problem in problems(cfg) if problem not in at_start]
    if cfg is None or found:
        raise ConfigError(found)

    from vl3train.data.pipeline import evaluation_batches, open_data
    from vl3train.engine.evaluate import evaluate, table_rows
    from vl3train.engine.monitor.console import Console
    from vl3train.engine.ranks import join
    from vl3train.model.attention.backends import choose_attention
    from vl3train.model.packed_forward import PackedModel, head_dims
    from vl3train.model.weights.hf_folder import load_trained

    rank = join(cfg.machine)
    console = Console(args.run, stage_name=cfg.stage.name, enabled=True)
    held_out = open_data(
        cfg, tokenizer_dir=args.run / "processor", held_out=True, build=True, progress=console.progress
    )
    if not held_out.index.num_samples:
        raise ValueError(f"the recipe {cfg.data.recipe or cfg.stage.recipe} has no held-out samples")
    model, _ = load_trained(args.model or args.run)
    model.to(rank.device)
    dtype = next(model.parameters()).dtype
    attention = choose_attention(cfg.machine.attention.value, rank.device, head_dims(model), dtype)
    packed = PackedModel(model, attention.name).eval()
    figures = evaluate(
        lambda batch: packed(batch.to(rank.device)),
        evaluation_batches(held_out, cfg, rank=rank.index, dp_size=rank.dp_size),
        list(held_out.index.source_names),
        dp_size=rank.dp_size,
    )
    console.table(f"held-out samples, {args.model or args.run}", table_rows(figures))
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1))
    return 0
