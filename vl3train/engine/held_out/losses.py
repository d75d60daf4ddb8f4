"""Held-out loss and accuracy of each source, against chance."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vl3train.contracts.files import write_whole
from vl3train.contracts.progress.record import progress
from vl3train.contracts.records import Batch
from vl3train.contracts.strict_json import json_text, without_texts

EVALUATIONS = "evaluations.jsonl"
"""In a run's folder: a line for each evaluation."""
DIGEST = "sha256"
"""Key of a line's digest. Builds before 2026-12 wrote none."""


@torch.no_grad()
def evaluate(
    forward: Callable[[Batch], Any], batches: Iterable[Batch], source_names: list[str], *, dp_size: int
) -> dict[str, dict[str, Any]]:
    """Loss and exact-match accuracy of each source, over all ranks.

    A sample is right when the most likely token is the right one at every supervised position, given the right tokens
    before it: greedy decoding would generate exactly the answer. Chance is the share of the most frequent answer among
    the held-out samples of the source: a model that ignores the picture can reach it.

    ``forward`` is a PackedModel's, in evaluation mode. Every rank must get the same number of batches.
    """
    rows: list[tuple[int, bool, float, int, tuple[int, ...]]] = []
    for batch in batches:
        progress.touch()
        output = forward(batch)
        segments = batch.supervised_segments.tolist()
        labels = batch.supervised_labels.tolist()
        correct = output.correct.tolist()
        losses = output.token_losses.tolist()
        by_segment: dict[int, list[int]] = {}
        for i, segment in enumerate(segments):
            by_segment.setdefault(segment, []).append(i)
        for segment, members in by_segment.items():
            rows.append(
                (
                    batch.segment_sources[segment],
                    all(correct[i] for i in members),
                    sum(losses[i] for i in members),
                    len(members),
                    tuple(labels[i] for i in members),
                )
            )
    gathered: list[Any] = [None] * dp_size
    dist.all_gather_object(gathered, rows)
    return summarize([row for part in gathered for row in part], source_names)


def summarize(
    rows: list[tuple[int, bool, float, int, tuple[int, ...]]], source_names: list[str]
) -> dict[str, dict[str, Any]]:
    """Rows of (source, right, loss sum, supervised tokens, answer ids) as figures of each source."""
    figures: dict[str, dict[str, Any]] = {}
    for source, name in enumerate(source_names):
        mine = [row for row in rows if row[0] == source]
        if not mine:
            continue
        tokens = sum(row[3] for row in mine)
        figures[name] = {
            "samples": len(mine),
            "loss": sum(row[2] for row in mine) / tokens,
            "accuracy": sum(row[1] for row in mine) / len(mine),
            "chance": Counter(row[4] for row in mine).most_common(1)[0][1] / len(mine),
            "supervised_tokens": tokens,
        }
    return figures


def table_rows(figures: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """The figures as the console shows them."""
    return [
        {
            "source": name,
            "samples": f"{row['samples']}",
            "loss": f"{row['loss']:.3f}",
            "accuracy": f"{row['accuracy']:.0%}",
            "chance": f"{row['chance']:.0%}",
        }
        for name, row in figures.items()
    ]


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
                f"{path} is damaged: line {number} is no evaluation ({error!r}). Restore it from a copy, or move it "
                "away: the figures of earlier evaluations then no longer count"
            ) from error
    return found
