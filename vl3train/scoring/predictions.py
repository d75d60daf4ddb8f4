"""predictions.jsonl: a line for each question, with the recorded answer, the generated one and its scores."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vl3train.contracts.files import write_whole
from vl3train.contracts.strict_json import json_text, without_texts
from vl3train.scoring.intervals import mean_with_interval
from vl3train.scoring.metrics import Scored, score


@dataclass(slots=True, kw_only=True)
class Prediction:
    """A question that was answered."""

    key: str  # of the sample: shard and member
    answer_number: int  # which of the sample's recorded answers this is compared with; 0 is the first
    source: str
    question: str
    reference: str  # the recorded answer
    prediction: str
    is_cut: bool  # the answer was longer than the most tokens allowed
    scores: dict[str, float] = field(default_factory=dict)
    media: list[str] = field(default_factory=list)  # shard and member of each image and clip of the sample

    @property
    def place(self) -> tuple[str, str, int]:
        """What names the question, the same in each evaluation."""
        return self.source, self.key, self.answer_number


def score_predictions(
    predictions: Sequence[Prediction], metrics: Mapping[str, Sequence[str]], folder: Path
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Put the scores of each source's metrics into its predictions; figures of each source.

    Args:
        predictions: of one or several sources.
        metrics: names of metrics of each source.
        folder: where paths of the user's own metrics start: the recipe's.

    Returns:
        For each source its number of ``questions``, how many answers were ``cut``, and for each metric its mean, and
        ``_low`` and ``_high``, the bounds of its 95 % confidence interval. Then what is wrong with metrics of the
        user's own that failed, which have no figures.
    """
    figures: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for source, names in metrics.items():
        mine = [one for one in predictions if one.source == source]
        if not mine:
            continue
        scored = [Scored(one.question, one.reference, one.prediction) for one in mine]
        figures[source] = {"questions": len(mine), "cut": sum(one.is_cut for one in mine)}
        for name in names:
            try:
                scores = score(name, scored, folder)
            except ValueError as error:
                problems.append(f"source {source}: {error}")
                continue
            for one, value in zip(mine, scores, strict=True):
                one.scores[name] = value
            mean, low, high = mean_with_interval(scores, [one.key for one in mine])
            figures[source] |= {name: mean, f"{name}_low": low, f"{name}_high": high}
    return figures, problems


def write_predictions(file: Path, predictions: Iterable[Prediction]) -> None:
    """Write them in the order of their samples, in place of what the file held."""
    ordered = sorted(predictions, key=lambda one: one.place)
    write_whole(file, "".join(json_text(asdict(one), letters=True) + "\n" for one in ordered))


def read_predictions(file: Path) -> list[Prediction]:
    """The predictions of a file; of one that a stop cut short, the whole lines.

    Raises:
        ValueError: a line that is not the last one is no prediction, or the file is no text.
    """
    if not file.is_file():
        return []
    found = []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: no text in UTF-8 ({error}); move the file away") from error
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            found.append(_checked(Prediction(**without_texts(json.loads(line)))))
        except (ValueError, TypeError, RecursionError) as error:
            if number == len(lines):  # no newline after it: its writing was cut short
                break
            raise ValueError(f"{file}, line {number}: no prediction ({error}); move the file away") from error
    return found


def _checked(one: Prediction) -> Prediction:
    """The same prediction; ValueError where a field is of another kind."""
    texts = (one.key, one.source, one.question, one.reference, one.prediction)
    if not all(isinstance(text, str) for text in texts) or not isinstance(one.answer_number, int):
        raise ValueError("a text or a number is something else")
    if not isinstance(one.scores, dict) or not all(
        isinstance(value, float | int) for value in one.scores.values()
    ):
        raise ValueError("scores are no numbers by name")
    return one
