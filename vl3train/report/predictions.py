"""Answers that runs gave while they trained: to a few held-out questions, step by step, with their media."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vl3train.data.recipe import load_recipe
from vl3train.data.shards.tar_headers import CLIP_SUFFIXES, IMAGE_SUFFIXES
from vl3train.data.shards.tar_members import Member, read_members
from vl3train.report.run_log import RunLog
from vl3train.scoring.predictions import Prediction, read_predictions

QUESTIONS_SHOWN = 6
"""Of each kind, right and wrong."""
STEPS_SHOWN = 5
FILE = re.compile(r"step_(\d+)\.jsonl")


@dataclass(frozen=True, slots=True)
class AnswerAt:
    """What a run said after so many steps."""

    run: str
    step: int
    prediction: Prediction

    @property
    def score(self) -> float:
        """The first metric's; without metrics 1 for the very words of the recorded answer."""
        scores = list(self.prediction.scores.values())
        return scores[0] if scores else float(self.prediction.prediction == self.prediction.reference)

    @property
    def is_right(self) -> bool:
        """Whether the score is as high as it can be."""
        return self.score >= 1


@dataclass(frozen=True, slots=True)
class ShownQuestion:
    """A question with all answers to it, run by run, in the order of the steps."""

    answers: list[AnswerAt]
    media: list[bytes] = field(default_factory=list)

    @property
    def last(self) -> AnswerAt:
        """The last answer of the last run."""
        return self.answers[-1]


def shown_questions(runs: Sequence[RunLog]) -> tuple[list[ShownQuestion], int, int]:
    """Questions to show, and how many there are whose last answer is right, and wrong.

    Some of each, from all sources in turn; those whose answer changed on the way come first.
    """
    found: dict[tuple[str, str, int], list[AnswerAt]] = {}
    for run in runs:
        for step, predictions in predictions_of(run):
            for one in predictions:
                found.setdefault(one.place, []).append(AnswerAt(run.name, step, one))
    questions = [ShownQuestion(answers) for answers in found.values()]
    right = [one for one in questions if one.last.is_right]
    wrong = [one for one in questions if not one.last.is_right]
    chosen = [one for kind in (wrong, right) for one in in_turn(kind)[:QUESTIONS_SHOWN]]
    media = _Media(runs)
    shown = [ShownQuestion(one.answers, media.of(one.last.prediction)) for one in chosen]
    return shown, len(right), len(wrong)


def predictions_of(run: RunLog) -> list[tuple[int, list[Prediction]]]:
    """A run's predictions after each of some steps: the first, the last, and a few between."""
    if run.folder is None:
        return []
    files = {
        int(name[1]): file
        for file in (run.folder / "predictions").glob("*.jsonl")
        if (name := FILE.fullmatch(file.name))
    }
    steps = sorted(files)
    if len(steps) > STEPS_SHOWN:
        steps = [steps[round(at * (len(steps) - 1) / (STEPS_SHOWN - 1))] for at in range(STEPS_SHOWN)]
    return [(step, read_predictions(files[step])) for step in steps]


def in_turn(questions: Iterable[ShownQuestion]) -> list[ShownQuestion]:
    """One of each source after the other; within a source those first whose answers differ."""
    of_source: dict[str, list[ShownQuestion]] = {}
    for one in questions:
        of_source.setdefault(one.last.prediction.source, []).append(one)
    for same in of_source.values():
        same.sort(
            key=lambda one: (len({answer.is_right for answer in one.answers}) < 2, one.last.prediction.key)
        )
    ordered = []
    while of_source:
        for source in list(of_source):
            ordered.append(of_source[source].pop(0))
            if not of_source[source]:
                del of_source[source]
    return ordered


class _Media:
    """Files of held-out samples, from the shards that the runs' recipes name, while they are there."""

    def __init__(self, runs: Sequence[RunLog]) -> None:
        self._folders: dict[str, Path] = {}
        self._members: dict[Path, list[Member]] = {}
        for run in runs:
            for source in _sources(run):
                if source.held_out is not None:
                    self._folders.setdefault(source.name, source.held_out)

    def of(self, one: Prediction) -> list[bytes]:
        """Pictures and clips of the question; none where its shard is gone, or on other storage."""
        stem, _, member = one.key.removeprefix(f"{one.source}/").partition("/")
        shard = self._folders.get(one.source, Path()) / f"{stem}.tar"
        if not shard.is_file():
            return []
        if shard not in self._members:
            self._members[shard] = [found for found in read_members(shard) if isinstance(found, Member)]
        mine = [found for found in self._members[shard] if _is_medium(found.name, member)]
        with shard.open("rb") as file:
            return [_read(file, found) for found in mine]


def _is_medium(name: str, member: str) -> bool:
    suffix = name.rpartition(".")[2].lower()
    return name.startswith(f"{member}.") and suffix in IMAGE_SUFFIXES | CLIP_SUFFIXES


def _read(file: Any, member: Member) -> bytes:
    file.seek(member.offset)
    return bytes(file.read(member.size))


def _sources(run: RunLog) -> Sequence[Any]:
    """Of the run's recipe; none where its config or recipe is gone."""
    file = Path() if run.folder is None else run.folder / "config.yaml"
    if not file.is_file():
        return ()
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    data, stage = config.get("data") or {}, config.get("stage") or {}
    try:
        return load_recipe(str(data.get("recipe") or stage.get("recipe")), data.get("root") or ".").sources
    except (ValueError, OSError):
        return ()
