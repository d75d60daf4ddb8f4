"""A small demo: a few samples of every source, and the debug model's parts."""

from __future__ import annotations

import random
from pathlib import Path

from vl3train.demo.build import write_folder
from vl3train.demo.parts import PartSizes, make_debug_parts
from vl3train.demo.questions import TASKS

FEW = ("captions", "count", "text", "when")
"""Pictures, text alone and clips. A run on all of the demo opens 22 indexes and evaluates eleven sources."""


def make_small_demo(root: Path) -> None:
    """Write it into an empty folder; the language model is trained for two steps only."""
    sources = [f"  - {{name: {one}, shards: {one}, held_out: {one}-held-out}}" for one in FEW]
    root.mkdir(parents=True, exist_ok=True)
    (root / "few.yaml").write_text(
        "name: few\nabout: Four of its sources.\nsources:\n" + "\n".join(sources) + "\n"
    )
    for source in FEW:
        write_folder(root, source, 0, 0.02)
        write_folder(root, f"{source}-held-out", 0, 0.02)
    rng = random.Random(0)
    questions = [TASKS[source](rng) for source in TASKS for _ in range(8)]
    make_debug_parts(root / "parts", questions, 0, PartSizes(steps=2), lambda *_: None)


def small_demo_words(root: Path, num_workers: int = 0) -> list[str]:
    """The options that every run on it shares."""
    return [
        "model=debug",
        "data=demo",
        "machine=cpu",
        f"data.root={root}",
        f"data.recipe={root / 'few.yaml'}",
        f"data.num_workers={num_workers}",
        "data.max_visual_tokens=256",
        "step.max_tokens=512",
        "step.max_patches=1024",
        "step.global_packs=2",
        "run.save_steps=2",
    ]
