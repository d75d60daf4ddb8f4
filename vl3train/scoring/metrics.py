"""Metrics by the names that a recipe gives them, and functions of the user's own."""

from __future__ import annotations

import difflib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl3train.scoring.captions import cider, rouge_l
from vl3train.scoring.matches import anls, exact, multiple_choice, relaxed
from vl3train.scoring.temporal import temporal_iou

EACH: dict[str, Callable[[str, str], float]] = {
    "exact": exact,
    "relaxed": relaxed,
    "anls": anls,
    "multiple_choice": multiple_choice,
    "temporal_iou": temporal_iou,
    "rouge_l": rouge_l,
}
"""Metrics that look at one answer: (prediction, reference) -> score."""

TOGETHER: dict[str, Callable[[Sequence[str], Sequence[str]], list[float]]] = {"cider": cider}
"""Metrics that need all answers of a source at once."""

NEEDS = {"anls": "rapidfuzz", "rouge_l": "rouge_score", "cider": "pycocoevalcap"}
"""Packages of the extra ``evaluate``, by the metrics that need them."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A question with its recorded answer and the generated one."""

    question: str
    reference: str
    prediction: str


def metric_problem(name: str, folder: Path) -> str | None:
    """Why a metric of a recipe in ``folder`` cannot be used, with the way out; None where it can."""
    if ":" in name:
        path, function = _own(name, folder)
        if not path.is_file() or path.suffix != ".py":
            return f"metric {name}: there is no file {path}" + (
                "" if path.suffix == ".py" else " that ends in .py"
            )
        if f"def {function}(" not in path.read_text(encoding="utf-8", errors="replace"):
            return f"metric {name}: {path} defines no function {function}(prediction, reference, question)"
        return None
    known = [*EACH, *TOGETHER]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = (
            f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}, and FILE.py:FUNCTION"
        )
        return f"unknown metric {name}{hint}"
    needed = NEEDS.get(name)
    if needed is not None and importlib.util.find_spec(needed) is None:
        return f"metric {name} needs {needed}: pip install 'vl3train[evaluate]'"
    return None


def score(name: str, answers: Sequence[Scored], folder: Path) -> list[float]:
    """One score for each answer, by a metric that ``metric_problem`` found nothing wrong with.

    Raises:
        ValueError: no recorded answer is one that the metric can read, or a function of the user's own cannot be
            imported, failed, or gave no number; the message has the question.
    """
    if name in TOGETHER:
        return TOGETHER[name]([one.prediction for one in answers], [one.reference for one in answers])
    if name in EACH:
        metric = EACH[name]
        if answers and not any(metric(one.reference, one.reference) for one in answers):
            raise ValueError(
                f"metric {name} can read none of the recorded answers, such as {answers[0].reference!r} to "
                f"{answers[0].question!r}; name another metric for this source"
            )
        return [metric(one.prediction, one.reference) for one in answers]
    try:
        function = _load(*_own(name, folder))
    except (Exception, SystemExit) as error:
        raise ValueError(f"metric {name} cannot be imported: {error!r}") from error
    scores = []
    for one in answers:
        try:
            scores.append(_number(function(one.prediction, one.reference, one.question)))
        except (Exception, SystemExit) as error:
            raise ValueError(
                f"metric {name} failed on the answer {one.prediction!r} to {one.question!r}: {error!r}"
            ) from error
    return scores


def _number(value: Any) -> float:
    found = float(value)
    if not math.isfinite(found):
        raise ValueError(f"it gave {value!r}, of which there is no mean")
    return found


def _own(name: str, folder: Path) -> tuple[Path, str]:
    path, _, function = name.rpartition(":")
    return folder / Path(path).expanduser(), function


def _load(path: Path, function: str) -> Callable[[str, str, str], Any]:
    spec = importlib.util.spec_from_file_location(f"metrics_of_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[[str, str, str], Any] = getattr(module, function)
    return found
