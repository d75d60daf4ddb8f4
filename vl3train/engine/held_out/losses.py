"""Held-out loss and accuracy of each source, against chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from vl3train.contracts.progress.record import progress
from vl3train.contracts.records import Batch


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
