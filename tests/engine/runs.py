"""Runs of the training loop on the small demo, and what they leave."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from safetensors.torch import load_file

from vl3train.engine.loop import train
from vl3train.engine.ranks import join
from vl3train.preview.check_config import check_config


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
