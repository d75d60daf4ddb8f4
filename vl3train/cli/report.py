"""Draw the loss curves, the accuracies against chance and sample predictions of runs on one page.

Writes loss_curves.png, accuracy.png and report.html, which holds everything it shows and opens without a
network. A report that is there already is replaced.

examples:
  vl3train report runs/1 runs/2 runs/3 runs/4 --out report
  vl3train report runs/1 runs/2 --out report --answers answers.jsonl --expected expected.jsonl

answers.jsonl is what `vl3train generate --batch` wrote. Line for line, expected.jsonl says what is right:
  {"source": "count", "key": "0001", "answer": "3"}
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """What one run wrote of itself."""

    name: str
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def evaluation(self, *, first: bool) -> dict[str, dict[str, float]] | None:
        """Figures of each source before the first step, or the last ones after it."""
        found = [line for line in self.evaluations if (line["when"] == "start") == first]
        return found[-1]["sources"] if found else None


@dataclass(frozen=True, kw_only=True)
class Milestone:
    """Held-out figures of each source at one moment of the training, such as after a stage."""

    name: str
    sources: dict[str, dict[str, float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``vl3train report``."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="output folders, in the order they were trained"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--answers", metavar="JSONL", help="answers to show beside their pictures")
    parser.add_argument("--expected", metavar="JSONL", help="the right answers, line for line")


def main(args: argparse.Namespace) -> int:
    """Read the logs, draw, write the page, and return 0.

    Raises ValueError naming everything that is missing or wrong in what is to be read.
    """
    problems: list[str] = []
    runs = [run for folder in args.runs if (run := read_run(Path(folder), problems)) is not None]
    if (args.answers is None) != (args.expected is None):
        problems.append("--answers and --expected go together")
    samples = []
    if args.answers is not None and args.expected is not None:
        samples = read_samples(Path(args.answers), Path(args.expected), problems)
    if problems:
        raise ValueError("\n".join(problems))

    from vl3train.cli.report_figures import draw_accuracies, draw_losses
    from vl3train.cli.report_page import write_page

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    reached = milestones(runs)
    figures = {"loss_curves": {dark: draw_losses(runs, dark=dark) for dark in (False, True)}}
    if reached:
        figures["accuracy"] = {dark: draw_accuracies(reached, dark=dark) for dark in (False, True)}
    for name, of_theme in figures.items():
        (out / f"{name}.png").write_bytes(of_theme[False])
    write_page(out / "report.html", runs, reached, figures, samples)
    written = ", ".join([*(f"{name}.png" for name in figures), "report.html"])
    print(
        f"wrote {written} to {out}" + ("" if reached else "; no run was evaluated, so no accuracy is drawn")
    )
    return 0


def read_run(folder: Path, problems: list[str]) -> RunLog | None:
    """The log of one run; what is wrong goes to ``problems``."""
    steps = read_lines(folder / "metrics.jsonl", ("step", "loss"), problems)
    if not steps:
        problems.append(f"{folder} holds no figures; is it the output folder of a run that has begun?")
        return None
    evaluations: list[dict[str, Any]] = []
    if (folder / "evaluations.jsonl").exists():
        keys = ("stage", "step", "when", "sources")
        evaluations = read_lines(folder / "evaluations.jsonl", keys, problems)
    name = f"stage {evaluations[0]['stage']}" if evaluations else folder.name
    return RunLog(name=name, steps=steps, evaluations=evaluations)


def read_lines(file: Path, keys: tuple[str, ...], problems: list[str]) -> list[dict[str, Any]]:
    """Lines of JSON, each with ``keys``; a last line without its end (a run still writes) is left out."""
    if not file.exists():
        problems.append(f"{file} does not exist")
        return []
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{file}, line {number} is not JSON: {error}")
            continue
        if lacking := [key for key in keys if key not in entry]:
            problems.append(f"{file}, line {number} lacks {', '.join(lacking)}")
            continue
        found.append(entry)
    return found


def read_samples(answers: Path, expected: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Answers beside what is right; what is wrong with the files goes to ``problems``."""
    so_far = len(problems)
    given = read_lines(answers, ("prompt", "answer"), problems)
    right = read_lines(expected, ("source", "key", "answer"), problems)
    if len(problems) > so_far:
        return []
    if len(given) != len(right):
        problems.append(
            f"{answers} has {len(given)} answers and {expected} {len(right)}: they go line for line"
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


def milestones(runs: list[RunLog]) -> list[Milestone]:
    """Before the first run and after every one, as far as they were evaluated."""
    found = []
    if (sources := runs[0].evaluation(first=True)) is not None:
        found.append(Milestone(name="before", sources=sources))
    for run in runs:
        if (sources := run.evaluation(first=False)) is not None:
            found.append(Milestone(name=f"after {run.name}", sources=sources))
    return found


def clearly_above_chance(figures: dict[str, float]) -> bool:
    """Whether guessing would do as well in fewer than about one of forty times: two standard deviations.

    >>> clearly_above_chance({"accuracy": 0.6, "chance": 0.25, "samples": 40})
    True
    >>> clearly_above_chance({"accuracy": 0.3, "chance": 0.25, "samples": 40})
    False
    """
    chance, samples = figures["chance"], figures["samples"]
    deviation = (chance * (1 - chance) / samples) ** 0.5
    return bool(figures["accuracy"] > chance + 2 * deviation)
