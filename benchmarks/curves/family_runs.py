"""Runs of the train command on the same records, with shared prefixes and apart: how far their losses lie apart."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.curves.tables import smoothed
from benchmarks.figures import Figures
from vl3train.contracts.exit_codes import FINISHED
from vl3train.data.prepare.annotated_records import AnnotatedRecords
from vl3train.data.prepare.write_shards import write_shards
from vl3train.demo.build import turns, write_media
from vl3train.demo.parts import PartSizes, make_debug_parts
from vl3train.demo.questions import TASKS, Question

PICTURES, CLIPS = 4, 1
ASKED = ("Describe it.", "What is shown?")
"""Besides the task's own question; the answer is the description."""
RUNS = {
    "apart": ["data.share_prefix=false", "step.global_packs=2"],
    "shared": ["data.share_prefix=true", "step.global_packs=2"],
    "noise": [
        "data.share_prefix=false",
        "step.global_packs=4",
    ],  # the same in other packs: only the rounding differs
}


def measure_curve(root: Path, figures: Figures, steps: int) -> None:
    """Train each of ``RUNS`` below ``root``, and keep their losses.

    Each step has all records once, so that the runs differ in nothing but who shares a prefix with whom.
    """
    words = [*make_data(root), f"run.num_steps={steps}"]
    losses = {name: train(root / name, [*words, *more]) for name, more in RUNS.items()}
    distance = {name: largest(losses[name], losses["apart"]) for name in ("shared", "noise")}
    note = (
        f"largest difference of means of 10 steps from the run apart, {steps} steps in float32 on the CPU, {PICTURES} "
        f"pictures and {CLIPS} clips with {1 + len(ASKED)} records each in every step; aim: that of the run apart in "
        "other packs"
    )
    figures.add("family_curve_distance", distance["shared"], "nats a token", "lower", note, distance["noise"])
    for name, of_run in losses.items():
        mean = float(np.mean(of_run[-50:]))
        distance_50 = first_50(of_run, losses["apart"])
        figures.write(
            {
                "figure": f"family_curve_{name}",
                "value": mean,
                "unit": "nats a token",
                "better": "lower",
                "note": f"mean of the last 50 steps; the first 50 are within {distance_50:.1e} of the run apart",
                "more": {"losses": [round(loss, 6) for loss in of_run]},
                "machine": figures.machine,
                "versions": figures.versions,
                "command": figures.command,
            }
        )


def largest(losses: list[float], others: list[float]) -> float:
    """The largest difference of means of ten steps."""
    return float(np.max(np.abs(smoothed(losses) - smoothed(others))))


def first_50(losses: list[float], others: list[float]) -> float:
    """The largest difference of one of the first 50 steps."""
    return float(np.max(np.abs(np.subtract(losses[:50], others[:50]))))


def make_data(root: Path) -> list[str]:
    """Shards with a member for each family, and the debug model's parts; returns the options of a run on them."""
    rng = random.Random(0)
    asked = [TASKS["count"](rng) for _ in range(PICTURES)] + [TASKS["motion"](rng) for _ in range(CLIPS)]
    media = root / "media"
    media.mkdir(parents=True)
    lines = []
    for question, record in zip(asked, write_media(media, "asked", asked), strict=True):
        tag, _, _ = record["conversations"][0]["value"].partition("\n")
        others = [replace(question, question=words, answer=described(question)) for words in ASKED]
        for one in (question, *others):
            lines.append(json.dumps({**record, "id": str(len(lines)), "conversations": turns(tag, one)}))
    (root / "records.jsonl").write_text("\n".join(lines) + "\n")
    write_shards(
        AnnotatedRecords((str(root / "records.jsonl"),), (media,)),
        root / "asked",
        max_samples=1000,
        max_bytes=10**9,
        skip_rejected=False,
        progress=lambda *_: None,
        share_media=True,
    )
    sources: list[dict[str, Any]] = [{"name": "asked", "shards": "asked"}]
    (root / "recipe.yaml").write_text(json.dumps({"name": "asked", "about": "A few.", "sources": sources}))
    words = asked + [TASKS["captions"](rng) for _ in range(200)]
    make_debug_parts(root / "parts", words, 0, PartSizes(steps=40), lambda *_: None)
    return [
        "stage=1",
        "stage.learning_rates={vision_encoder: 2e-3, projector: 2e-3, language_model: 1e-3}",
        "stage.prune_frames=true",
        "model=debug",
        "data=demo",
        "machine=cpu",
        f"data.root={root}",
        f"data.recipe={root / 'recipe.yaml'}",
        f"data.plan_cache={root / 'plans'}",
        "data.num_workers=0",
        "data.max_visual_tokens=36",
        "step.max_tokens=8192",
        "step.max_patches=16384",
        "step.max_samples=null",
    ]


def described(question: Question) -> str:
    """What its picture or clip shows, in words."""
    shown = question.clip or question.picture
    assert shown is not None
    return shown.description


def train(out: Path, words: list[str]) -> list[float]:
    """One run of the train command, in a process of its own; its losses."""
    command = [
        sys.executable,
        "-m",
        "vl3train.train",
        *words,
        f"run.output_dir={out}",
        "run.evaluate_at_end=false",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != FINISHED:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    print(f"{out.name}: {len(lines)} steps, last {json.loads(lines[-1])['loss']:.4f}", flush=True)
    return [json.loads(line)["loss"] for line in lines]
