"""What a run's data were when it started, kept in its output folder, so that a later start can say what changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vl3train.data.loader import OpenData
from vl3train.data.shards.contents import (
    DIGEST_CHARACTERS,
    Contents,
    Shard,
    changes,
    contents_of,
    read_contents,
    write_contents,
)
from vl3train.engine.start.data import RunData

CONTENTS = "data_contents.json.gz"
TRAIN, HELD_OUT = "train", "held_out"
SHOWN_LINES = 30


def keep_contents(folder: Path, data: RunData) -> None:
    """Write the contents of the data into the output folder; a start with the same data changes nothing."""
    now = {TRAIN: _contents(data.train)}
    if data.held_out is not None:
        now[HELD_OUT] = _contents(data.held_out)
    before = read_contents(folder / CONTENTS)
    if before is not None:
        now = {**before, **now}  # of held-out samples that this start does not evaluate
    if now != before:
        write_contents(folder / CONTENTS, now)


def train_changes(folder: Path, data: RunData) -> list[str]:
    """What of the training samples is not as it was when the run in this folder started."""
    before = read_contents(folder / CONTENTS)
    if before is None or TRAIN not in before:
        file = folder / CONTENTS
        return [f"what changed is not known: {file}, which a start writes, is missing or damaged"]
    lines = changes(before[TRAIN], _contents(data.train))
    if not lines:
        return ["shards and settings are as they were; the index was made by another build of this program"]
    rest = len(lines) - SHOWN_LINES
    return lines[:SHOWN_LINES] + ([f"and {rest} more changes"] if rest > 0 else [])


def held_out_changes(folder: Path, data: RunData) -> list[str]:
    """Remarks on held-out samples that are not as they were: figures before and after do not compare."""
    before = read_contents(folder / CONTENTS)
    if before is None or HELD_OUT not in before or data.held_out is None:
        return []
    lines = changes(before[HELD_OUT], _contents(data.held_out))
    return [f"held-out samples differ from those of the steps before: {line}" for line in lines[:SHOWN_LINES]]


def fingerprints(data: RunData) -> dict[str, Any]:
    """Of each split: the index's fingerprint, and of each source its numbers and a digest of all its rows."""
    splits = {TRAIN: data.train, **({HELD_OUT: data.held_out} if data.held_out is not None else {})}
    return {
        name: {
            "fingerprint": split.plan.table.fingerprint,
            "rendering": split.settings.fingerprint(),
            "sources": {source: of_source(shards) for source, shards in _contents(split).sources.items()},
        }
        for name, split in splits.items()
    }


def of_source(shards: Mapping[str, Shard]) -> dict[str, Any]:
    """What one source holds, in a few figures.

    >>> of_source({"b.tar": (None, 2, 0, "ff"), "a.tar": (9, 3, 1, "00")})
    {'shards': 2, 'samples': 5, 'rejected': 1, 'rows_sha256': '26426f9a2f3ac8ff'}
    """
    rows = "".join(f"{name} {shards[name][3]}\n" for name in sorted(shards))
    return {
        "shards": len(shards),
        "samples": sum(shard[1] for shard in shards.values()),
        "rejected": sum(shard[2] for shard in shards.values()),
        "rows_sha256": hashlib.sha256(rows.encode()).hexdigest()[:DIGEST_CHARACTERS],
    }


def _contents(data: OpenData) -> Contents:
    return contents_of(data.places)
