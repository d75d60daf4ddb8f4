"""Evaluate a trained model on the held-out samples of a recipe: loss, accuracy beside chance, and generated answers.

examples:
  vl3train evaluate runs/2b/4_video_finetuning                          the run's own recipe and newest checkpoint
  vl3train evaluate runs/2b/4_video_finetuning data.recipe=mine.yaml    held-out samples of another recipe
  vl3train evaluate export data.recipe=mine.yaml data.root=data         a Hugging Face folder
  vl3train evaluate export data.recipe=mine.yaml --metrics exact anls --out predictions.jsonl
  torchrun --nproc-per-node 8 -m vl3train.cli.main evaluate export data.recipe=mine.yaml       on eight GPUs

Answers are generated where the recipe names metrics of a source, or for all sources with --metrics. They go into
predictions.jsonl with question, recorded answer and scores. An evaluation that was stopped goes on with the same
command. docs/evaluation.md has the metrics.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from vl3train.config.checks.start import start_problems
from vl3train.config.load import read_config
from vl3train.config.paths import is_run_folder
from vl3train.config.problems import ConfigError
from vl3train.config.rules import problems
from vl3train.config.schema import TrainConfig
from vl3train.contracts.strict_json import json_text


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``vl3train evaluate``."""
    parser.add_argument("run", type=Path, metavar="MODEL", help="a run's output folder, or an export")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options, as data.recipe=mine.yaml")
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="other weights with the config of MODEL: a checkpoint, an export",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="score generated answers of all sources so (default: the recipe's)",
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default: 256)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("predictions.jsonl"),
        metavar="FILE",
        help="answers (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")


def main(args: Namespace) -> int:
    """Print the tables; returns 0. Raises ValueError or OSError for a folder or recipe that cannot be used."""
    refuse_places(args.out, args.json)
    overrides = list(args.overrides)
    if args.max_new_tokens is not None:
        overrides.append(f"run.evaluate_max_new_tokens={args.max_new_tokens}")
    if is_run_folder(args.run):
        cfg = checked(overrides, args.run / "config.yaml")
        tokenizer_dir = args.run / "processor"
    else:
        from vl3train.inference.rendering import exported_words
        from vl3train.model.weights.hf_folder import locate_trained

        tokenizer_dir, _ = locate_trained(args.run)
        cfg = checked([*exported_words(tokenizer_dir), *overrides], None)

    from vl3train.engine.held_out.of_model import evaluate_model

    figures = evaluate_model(
        cfg,
        args.model or args.run,
        tokenizer_dir=tokenizer_dir,
        metrics=args.metrics,
        out=args.out,
    )
    if args.json is not None:
        args.json.write_text(json_text(figures, indent=1))
    return 0


def refuse_places(*files: Path | None) -> None:
    """Raise ValueError, before the work, for files that could not be written after it."""
    found = []
    for file in (file for file in files if file is not None):
        if file.is_dir():
            found.append(f"{file} is a folder; name a file")
        elif not file.absolute().parent.is_dir():
            found.append(f"{file} cannot be written: there is no folder {file.parent}; make it first")
        elif not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
            found.append(f"{file} cannot be written; name another file")
    if found:
        raise ValueError("\n".join(found))


def checked(overrides: list[str], config_file: Path | None) -> TrainConfig:
    """The config; what the run started from may be gone by now. Raises ConfigError with every mistake."""
    cfg, found = read_config(overrides, config_file=config_file)
    if cfg is not None:
        at_start = start_problems(cfg)
        found += [problem for problem in problems(cfg) if problem not in at_start]
    if cfg is None or found:
        raise ConfigError(found)
    return cfg
