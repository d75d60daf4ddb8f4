"""A real training of the debug model, to see whether it waits for its data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def waited_shares(folder: Path, steps: int) -> list[float]:
    """Stage 1 of the debug model on the demo, two ranks with two workers each: what part of each step was a wait."""
    demo, run = folder / "demo", folder / "run"
    python = [sys.executable, "-m"]
    draw = [*python, "vl3train.cli.main", "demo", str(demo), "--samples-scale", "0.05"]
    train = [*python, "torch.distributed.run", "--nproc-per-node", "2", "-m", "vl3train.train"]
    options = {
        "stage": 1,
        "model": "debug",
        "data": "demo",
        "machine": "cpu",
        "data.root": demo,
        "data.num_workers": 2,
        "machine.dp_size": 2,
        "run.output_dir": run,
        "run.num_steps": steps,
        "run.evaluate_at_end": "false",
    }
    subprocess.run(draw, check=True, stdout=sys.stderr)
    subprocess.run(
        [*train, *(f"{key}={value}" for key, value in options.items())], check=True, stdout=sys.stderr
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["data_wait_fraction"] for line in lines if "data_wait_fraction" in line]
