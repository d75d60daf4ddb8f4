"""evaluations.jsonl: a line for each evaluation of a run, by which its best checkpoint is chosen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vl3train.config.problems import counted
from vl3train.contracts.files import write_whole
from vl3train.contracts.strict_json import json_text, without_texts

EVALUATIONS = "evaluations.jsonl"
"""In a run's folder."""
DIGEST = "sha256"
"""Key of a line's digest. Builds before 2026-12 wrote none."""
RESTORE = "Restore it from a copy, or move it away: the figures of earlier evaluations then no longer count"
"""The way out of damage."""


def record_evaluation(
    path: Path, *, stage: int, step: int, when: str, figures: dict[str, dict[str, Any]]
) -> None:
    """Write one evaluation to evaluations.jsonl, in place of an earlier one of the same step and moment."""
    entry = {"stage": stage, "step": step, "when": when, "sources": figures}
    entry[DIGEST] = digest_of(entry)
    kept = [line for line in read_evaluations(path) if (line["step"], line["when"]) != (step, when)]
    write_whole(path, "".join(json_text(line) + "\n" for line in [*kept, entry]))


def digest_of(entry: dict[str, Any]) -> str:
    """Of a line's other keys, 16 hex digits. A bit that flips in a figure leaves a line that can be read."""
    content = {key: value for key, value in entry.items() if key != DIGEST}
    return hashlib.sha256(json_text(content).encode()).hexdigest()[:16]


def truncate_evaluations(path: Path, done: int) -> None:
    """Move the evaluations after ``done`` steps, which a run that goes on from there makes again, to a file beside it.

    They are appended to ``evaluations.replaced.jsonl``, as ``metrics.replaced.jsonl`` has the steps.
    """
    found = read_evaluations(path)
    later = [line for line in found if line["step"] > done]
    if later:
        with path.with_name("evaluations.replaced.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json_text(line) + "\n" for line in later)
        kept = [line for line in found if line["step"] <= done]
        write_whole(path, "".join(json_text(line) + "\n" for line in kept))


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """The lines of evaluations.jsonl; none where there is no such file.

    Raises:
        ValueError: a line is damaged; the message names it. The best checkpoint is chosen by these figures.
    """
    found: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], start=1):
        try:
            entry = without_texts(json.loads(line))
            if entry.get(DIGEST, whole := digest_of(entry)) != whole:
                raise ValueError("its digest differs")
            found.append({**entry, "step": int(entry["step"]), "when": str(entry["when"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged: line {number} is no evaluation ({error!r}). {RESTORE}"
            ) from error
    return found


def evaluations_before(path: Path, done: int) -> dict[str, Any] | None:
    """How many evaluations there are of fewer than ``done`` steps, and their digest, for the checkpoint of that step;
    None where the file is damaged, which the next start refuses."""
    try:
        return _summary(read_evaluations(path), done)
    except ValueError:
        return None


def lost_evaluations(
    path: Path, lines: list[dict[str, Any]], stored: Mapping[str, Any] | None, done: int
) -> list[str]:
    """A remark where the evaluations that a checkpoint of ``done`` steps counted are gone with their file.

    Args:
        path: evaluations.jsonl.
        lines: what ``read_evaluations`` read there.
        stored: what ``evaluations_before`` gave; None in checkpoints of builds before 2026-12.
        done: steps.

    Raises:
        ValueError: the file is there, and some of them are not, or are no longer the same.
    """
    if stored is None or _summary(lines, done) == stored:
        return []
    had = f"{counted(stored['count'], 'evaluation')} of steps before {done} when the checkpoint was written"
    if not path.exists():
        return [f"{path} is gone. It had {had}, which no longer count for the best checkpoint"]
    now = _summary(lines, done)["count"]
    what = f"now has {now}" if now != stored["count"] else "these are no longer what they were"
    raise ValueError(f"{path} is damaged: it had {had}, and {what}. {RESTORE}")


def _summary(lines: list[dict[str, Any]], done: int) -> dict[str, Any]:
    digests = sorted(digest_of(line) for line in lines if line["step"] < done)
    return {"count": len(digests), "sha256": hashlib.sha256("".join(digests).encode()).hexdigest()[:16]}
