"""Logs of runs, read for the report."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vl3train.contracts.bad_step import numbered_from_1
from vl3train.contracts.strict_json import without_texts


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """What one run logged: a line for each step, and its evaluations."""

    name: str
    steps: list[dict[str, Any]]  # a line's ``step`` is the number of steps that were done
    folder: Path | None = None
    init_from: Path | None = None  # what the run started from
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def evaluation(self, *, first: bool) -> dict[str, dict[str, float]] | None:
        """Figures of each source before the first step, or else the last figures after it."""
        found = [line for line in self.evaluations if (line["when"] == "start") == first]
        return found[-1]["sources"] if found else None


def read_run(folder: Path, problems: list[str]) -> RunLog | None:
    """The log of one run; None when it has no figures. Whatever is wrong is added to ``problems``."""
    steps = read_lines(folder / "metrics.jsonl", ("step", "loss"), problems)
    if not steps:
        problems.append(f"{folder} holds no figures; is it the output folder of a run that has started?")
        return None
    steps = [numbered_from_1(step) for step in steps]
    for step in steps:
        if "skipped_samples" in step:  # its name before 2026-12
            step["failed_samples"] = step.pop("skipped_samples")
    evaluations: list[dict[str, Any]] = []
    if (folder / "evaluations.jsonl").exists():
        keys = ("stage", "step", "when", "sources")
        evaluations = without_texts(read_lines(folder / "evaluations.jsonl", keys, problems))
    return RunLog(
        name=folder.resolve().name,
        steps=steps,
        folder=folder,
        init_from=start_of(folder),
        evaluations=evaluations,
    )


def start_of(folder: Path) -> Path | None:
    """What a run started from, by its config; None where it was put together from parts, or says nothing."""
    file = folder / "config.yaml"
    if not file.is_file():
        return None
    start = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("stage", {}).get("init_from")
    return None if start is None else Path(str(start)).expanduser()


def read_lines(file: Path, keys: tuple[str, ...], problems: list[str]) -> list[dict[str, Any]]:
    """Lines of JSON, each with ``keys``. A last line that is incomplete, because the run still writes, is ignored."""
    if not file.exists():
        problems.append(f"{file} does not exist")
        return []
    try:
        # Not splitlines: an answer may hold one of the other ends of lines that it knows, as U+2028.
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    except UnicodeDecodeError as error:
        problems.append(f"{file} is no text in UTF-8: {error}")
        return []
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"{file}, line {number} is not JSON: {error}")
            continue
        if not isinstance(entry, dict):
            problems.append(f"{file}, line {number} is no JSON object")
            continue
        if lacking := [key for key in keys if key not in entry]:
            problems.append(f"{file}, line {number} lacks {', '.join(lacking)}")
            continue
        found.append(entry)
    return found


def read_samples(answers: Path, expected: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Answers with the expected answers. Whatever is wrong with the files is added to ``problems``."""
    so_far = len(problems)
    given = read_lines(answers, ("prompt", "answer"), problems)
    right = read_lines(expected, ("source", "key", "answer"), problems)
    if len(problems) > so_far:
        return []
    if len(given) != len(right):
        problems.append(
            f"{answers} has {len(given)} answers and {expected} {len(right)}: they must have a line for each other"
        )
        return []
    samples = []
    for number, (line, wanted) in enumerate(zip(given, right, strict=True), start=1):
        media = [*line.get("image", []), *line.get("video", [])]
        gone = [path for path in media if not Path(path).is_file()]
        problems.extend(f"{answers}, line {number}: {path} does not exist" for path in gone)
        about = {"media": media, "question": line["prompt"], "prediction": line["answer"]}
        samples.append({**wanted, **about})
    return samples


def clearly_above_chance(figures: dict[str, float]) -> bool:
    """Whether the accuracy is more than two standard deviations of guessing above chance.

    Guessing reaches that about once in forty times.

    >>> clearly_above_chance({"accuracy": 0.6, "chance": 0.25, "samples": 40})
    True
    >>> clearly_above_chance({"accuracy": 0.3, "chance": 0.25, "samples": 40})
    False
    """
    chance, samples = figures["chance"], figures["samples"]
    deviation = (chance * (1 - chance) / samples) ** 0.5
    return bool(figures["accuracy"] > chance + 2 * deviation)
