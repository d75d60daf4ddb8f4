"""Trains the four stages with the train command, several seeds and variants side by side on one machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lessons.tasks import TASKS
from benchmarks.lessons.variants import VARIANTS
from benchmarks.lessons.write import write_recipe
from vl3train.contracts.exit_codes import FINISHED

STAGES = {1: "1_encoder_adaptation", 2: "2_alignment", 3: "3_multitask_finetuning", 4: "4_video_finetuning"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is trained. ``steps`` and ``rates`` are those of the four stages; samples are those of a step."""

    parts: str
    train: int  # samples of each task
    held_out: int  # samples of each held-out split of a task
    steps: tuple[int, int, int, int]
    samples: int
    words: tuple[str, ...]
    rates: tuple[float, float] = (2e-3, 1e-3)
    """Of encoder and projector, of the language model."""


CPU = ("machine=one_cpu", "step.max_tokens=4096", "step.max_patches=8192", "data.num_workers=1")
GPU = (
    "machine=one_gpu",
    "machine.recompute_vision=nothing",
    "machine.recompute_language=nothing",
    "step.max_tokens=32768",
    "step.max_patches=65536",
    "data.num_workers=4",
)
SCALES = {
    "small": Scale(
        parts="small",
        train=5000,
        held_out=96,
        steps=(250, 350, 600, 600),
        samples=128,
        words=GPU,
        rates=(1e-3, 6e-4),
    ),
    "tiny": Scale(parts="tiny", train=900, held_out=16, steps=(150, 150, 400, 200), samples=24, words=CPU),
    "debug": Scale(parts="debug", train=8, held_out=2, steps=(1, 1, 1, 1), samples=8, words=CPU),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where data and runs of one scale lie."""

    root: Path
    scale: Scale

    @property
    def data(self) -> Path:
        """Shards, parts and recipes."""
        return self.root / "data"

    def run(self, variant: str, seed: int, stage: int) -> Path:
        """The output folder of one run of the train command."""
        return self.root / "runs" / variant / f"seed-{seed}" / STAGES[stage]


def recipe(place: Place, name: str, stage: int) -> Path:
    """Write the recipe of one stage of a variant."""
    variant = VARIANTS[name]
    file = place.data / f"{name}-stage{stage}.yaml"
    write_recipe(file, variant.weights(stage), variant.folders)
    return file


def options(place: Place, name: str, seed: int, stage: int, start: Path | None) -> list[str]:
    """The words of one run of the train command; ``start`` is the run that it goes on from."""
    variant, scale = VARIANTS[name], place.scale
    seeing, speaking = scale.rates
    rates = {"vision_encoder": seeing, "projector": seeing, "language_model": speaking}
    steps = scale.steps[stage - 1]
    if (
        stage in variant.left_out
    ):  # stage 1 alone can build the model from its parts: one step that changes nothing
        rates, steps = dict.fromkeys(rates, 1e-9), 1
    words = [
        f"stage={STAGES[stage]}",
        "model=own",
        "model.name=learning",
        "model.initializer_range=0.05",
        f"model.learning_rates={{{', '.join(f'{part}: {rate}' for part, rate in rates.items())}}}",
        "data=published",
        f"data.root={place.data}",
        f"data.recipe={recipe(place, name, stage)}",
        "data.max_visual_tokens=640",
        "data.max_frames=40",
        "data.video_min_pixels=3136",
        "step.global_packs=1",
        f"step.max_samples={scale.samples}",
        f"run.num_steps={steps}",
        f"run.seed={seed}",
        "run.evaluate_max_new_tokens=40",
        "run.save_steps=200",
        f"run.output_dir={place.run(name, seed, stage)}",
        *scale.words,
        *variant.words(stage),
    ]
    if start is not None:
        return [*words, f"stage.init_from={start}"]
    parts = place.data / "parts"
    return [
        *words,
        f"model.vision_encoder_from={parts / f'vision_encoder-{seed}'}",
        f"model.language_model_from={parts / 'language_model'}",
        "run.evaluate_at_start=true",
    ]


def train(place: Place, name: str, seed: int) -> dict[int, float]:
    """All stages of one variant with one seed; the seconds of each. What is finished is not trained again.

    Raises:
        RuntimeError: a stage failed; the message has the end of its log.
    """
    seconds = {}
    start: Path | None = None
    for stage in STAGES:
        if stage in VARIANTS[name].left_out and stage > 1:
            continue
        out = place.run(name, seed, stage)
        out.parent.mkdir(parents=True, exist_ok=True)
        log = out.with_suffix(".log")
        began = time.perf_counter()
        command = [sys.executable, "-m", "vl3train.train", *options(place, name, seed, stage, start)]
        with log.open("w") as file:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment())
        if done.returncode != FINISHED:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {log.read_text()[-3000:]}")
        seconds[stage] = time.perf_counter() - began
        print(f"{name}, seed {seed}, stage {stage}: {seconds[stage]:.0f} s", flush=True)
        start = out
    return seconds


def environment() -> dict[str, str]:
    """One thread a process: many run side by side."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def index(place: Place, name: str) -> None:
    """Measure every sample of a variant once, on all cores: runs that start side by side would each do it.

    Raises:
        RuntimeError: it failed; the message has the end of its output.
    """
    everything = place.data / f"{name}-all.yaml"
    write_recipe(everything, dict.fromkeys(TASKS, 1.0), VARIANTS[name].folders)
    words = [word for word in options(place, name, 0, 1, None) if not word.startswith("data.recipe=")]
    words += [f"data.recipe={everything}", f"data.num_workers={len(os.sched_getaffinity(0))}"]
    command = [sys.executable, "-m", "vl3train.cli.main", "index", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-3000:]}")


def train_all(place: Place, wanted: Sequence[tuple[str, int]], at_a_time: int) -> None:
    """Train variants with seeds, some at a time on one device. The first failure is raised when all have ended."""
    with ThreadPoolExecutor(at_a_time) as pool:
        for done in [pool.submit(train, place, name, seed) for name, seed in wanted]:
            done.result()
