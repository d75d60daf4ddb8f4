"""Runs of the training loop on the small demo, and what they leave."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from safetensors.torch import load_file

from vl3train.engine.loop import train
from vl3train.engine.ranks import join
from vl3train.preview.check_config import check_config

EARLIER = Path(__file__).parent / "run_before_2026_12"
"""A run of an earlier build, and the small data and parts that it read."""

EARLIER_WORDS = [
    "stage=1",
    "model=debug",
    "data=demo",
    "machine=cpu",
    "data.root=data",
    "data.recipe=recipe.yaml",
    "model.vision_encoder_from=parts/vision_encoder",
    "model.language_model_from=parts/language_model",
    "data.num_workers=0",
    "data.plan_cache=plans",
    "data.max_visual_tokens=64",
    "step.max_tokens=192",
    "step.max_patches=256",
    "step.global_packs=2",
    "run.num_steps=6",
    "run.save_steps=3",
    "run.evaluate_at_start=true",
    "run.evaluate_at_end=true",
    "run.output_dir=run",
]
"""Its options, with paths relative to a copy of the folder."""


def run(words):
    """One run of the loop in this process, a world of one."""
    cfg = check_config(Namespace(overrides=words, config=None, config_dir=None), dp_size=1)
    train(cfg, join(cfg.machine))
    return Path(cfg.run.output_dir)


def figures(folder, *names):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        tuple(json.dumps(line[name]) for name in ("step", "loss", "grad_norm", "source_losses", *names))
        for line in lines
    ]


def weights(folder):
    latest = (folder / "checkpoints" / "latest").read_text()
    return load_file(folder / "checkpoints" / latest / "weights" / "model.safetensors")
