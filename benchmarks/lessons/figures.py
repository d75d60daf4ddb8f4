"""Figures of the runs that are there: accuracy of each task with chance and interval, over all seeds."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import RESULTS, machine
from benchmarks.lessons.lesson import HELD_OUT_SPLITS
from benchmarks.lessons.runs import STAGES, Place
from benchmarks.lessons.tasks import TASKS
from benchmarks.lessons.variants import VARIANTS
from vl3train.contracts.strict_json import json_text
from vl3train.scoring.intervals import mean_with_interval
from vl3train.scoring.metrics import EACH
from vl3train.scoring.predictions import Prediction, read_predictions


def write_figures(place: Place, *, keep: bool) -> list[dict[str, Any]]:
    """Print a table, and keep a line of each figure; returns the lines."""
    lines = [line for name in VARIANTS for line in variant_figures(place, name)]
    print_table(lines)
    if keep:
        file = Path(os.environ.get("OUT") or RESULTS) / "learning.jsonl"
        file.write_text("".join(json_text(line) + "\n" for line in lines), encoding="utf-8")
    return lines


def variant_figures(place: Place, name: str) -> list[dict[str, Any]]:
    """Figures of a variant, before and after each stage: seeds are put together."""
    found = []
    seeds = sorted((place.root / "runs" / name).glob("seed-*"))
    for stage, when in [(1, "start"), *((stage, "end") for stage in STAGES)]:
        answers: dict[str, list[Prediction]] = defaultdict(list)
        for seed in seeds:
            folder = seed / STAGES[stage] / "predictions"
            files = sorted(folder.glob("step_*.jsonl"), key=lambda file: int(file.stem.split("_")[1]))
            if files and (when == "end" or len(files) > 1):
                for one in read_predictions(files[0 if when == "start" else -1]):
                    one.key = f"{seed.name}/{one.key}"
                    answers[one.source].append(one)
        for task, split in ((task, split) for task in TASKS for split in HELD_OUT_SPLITS):
            if mine := answers.get(f"{task}-{split}"):
                found.append(figure(name, task, split, 0 if when == "start" else stage, mine))
    return found


def figure(variant: str, task: str, split: str, stage: int, answers: Sequence[Prediction]) -> dict[str, Any]:
    """One line: mean score with its interval beside that of the best answer that is always the same."""
    metric = TASKS[task].metric
    scores = [one.scores[metric] for one in answers]
    mean, low, high = mean_with_interval(scores, [one.key for one in answers])
    by_seed: dict[str, list[float]] = defaultdict(list)
    for one, score in zip(answers, scores, strict=True):
        by_seed[one.key.split("/")[0]].append(score)
    name = "grounding_tiou" if task == "grounding" else f"accuracy_{task}"
    suffix = "" if (variant, split, stage) == ("full", "new", 4) else f"_{variant}_{split}_after_{stage}"
    aim = TASKS[task].aim if not suffix else None
    return {
        "figure": name + suffix,
        "value": round(mean, 4),
        "unit": "share" if metric == "exact" else "tIoU",
        "better": "higher",
        "chance": round(constant_answer(answers, metric), 4),
        "ci95": [round(low, 4), round(high, 4)],
        "seeds": [round(float(np.mean(by_seed[seed])), 4) for seed in sorted(by_seed)],
        **({} if aim is None else {"aim": aim, "reached": mean >= aim}),
        "note": f"{VARIANTS[variant].about}; {split} held-out samples, {len(answers)} answers; stage {stage}",
        "settings": {"variant": variant, "task": task, "split": split, "stage": stage},
        "machine": machine(),
        "versions": {package: version(package) for package in ("torch", "transformers", "deepspeed")},
        "command": "python -m benchmarks.learning",
    }


def constant_answer(answers: Sequence[Prediction], metric: str) -> float:
    """Score of the best answer that does not look: one of the 30 most frequent, the same for every sample."""
    known = [text for text, _ in Counter(one.reference for one in answers).most_common(30)]
    return max(float(np.mean([EACH[metric](text, one.reference) for one in answers])) for text in known)


def print_table(lines: Sequence[dict[str, Any]]) -> None:
    """A row for each variant, task and split: scores before and after each stage."""
    rows: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in lines:
        of = line["settings"]
        rows[of["variant"], of["task"], of["split"]][of["stage"]] = line
    print(
        "| variant | task | held out | chance | before | 1 | 2 | 3 | 4 | ci95 |\n"
        "|---|---|---|---:|---:|---:|---:|---:|---:|---|"
    )
    for (variant, task, split), stages in rows.items():
        shown = [f"{stages[stage]['value']:.2f}" if stage in stages else "" for stage in range(5)]
        last = stages[max(stages)]
        low, high = last["ci95"]
        print(
            f"| {variant} | {task} | {split} | {last['chance']:.2f} | {' | '.join(shown)} | {low:.2f} to {high:.2f} |"
        )
