"""What a run's data are, a line for each shard, to be kept by the run and compared when it starts again.

The fingerprint of an index says that something changed; this says what. 100 000 shards take about 2 MB.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vl3train.contracts.files import whole_file
from vl3train.contracts.strict_json import json_text
from vl3train.data.shards.manifest import IndexPlace, read_manifest

DIGEST_CHARACTERS = 16
"""Of the 64 of a sha256: the whole one is in the index's manifest."""
NAMED = 5
"""Shards of one kind of change that a line names."""

Shard = tuple[int | None, int, int, str]
"""Bytes (None where it is remote), samples, rejected samples, and the beginning of the digest of its rows."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """Settings of an index, and of every source its shards by name."""

    settings: dict[str, Any]
    sources: dict[str, dict[str, Shard]]


def contents_of(sources: Sequence[tuple[str, IndexPlace]]) -> Contents:
    """What the indexes of some sources hold, each a name and its shards.

    Raises:
        MissingIndexError: one is missing, stale or damaged.
    """
    settings = dataclasses.asdict(sources[0][1].settings) if sources else {}
    return Contents(
        settings=json.loads(json_text(settings)),
        sources={name: shards_of(read_manifest(place)) for name, place in sources},
    )


def shards_of(manifest: Mapping[str, Any]) -> dict[str, Shard]:
    """The shards of a manifest by their names."""
    return {
        one["name"]: (one["bytes"], one["samples"], one["rejected"], one["rows_sha256"][:DIGEST_CHARACTERS])
        for one in manifest["shards"]
    }


def write_contents(path: Path, splits: Mapping[str, Contents]) -> None:
    """Write what the data of each split are. The file appears whole."""
    text = json_text({split: dataclasses.asdict(contents) for split, contents in splits.items()})
    with whole_file(path) as partial:
        partial.write_bytes(gzip.compress(text.encode(), compresslevel=6, mtime=0))


def read_contents(path: Path) -> dict[str, Contents] | None:
    """What ``write_contents`` wrote; None where it is missing or damaged."""
    try:
        splits = json.loads(gzip.decompress(path.read_bytes()))
        return {
            split: Contents(
                settings=one["settings"],
                sources={
                    name: {shard: tuple(facts) for shard, facts in shards.items()}
                    for name, shards in one["sources"].items()
                },
            )
            for split, one in splits.items()
        }
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError):
        return None


def changes(before: Contents, now: Contents) -> list[str]:
    """What differs, a line for each source and kind of change; empty where nothing does."""
    lines = [
        f"setting {key}: {before.settings.get(key)}, now {now.settings.get(key)}"
        for key in sorted(before.settings.keys() | now.settings.keys())
        if before.settings.get(key) != now.settings.get(key)
    ]
    same_settings = not lines  # with others every row differs
    for name in [*before.sources, *(name for name in now.sources if name not in before.sources)]:
        if name not in now.sources:
            lines.append(f"source {name} ({len(before.sources[name])} shards): is gone")
        elif name not in before.sources:
            lines.append(f"source {name} ({len(now.sources[name])} shards): is new")
        else:
            found = shard_changes(before.sources[name], now.sources[name], rows=same_settings)
            lines += [f"source {name}: {line}" for line in found]
    both = [name for name in before.sources if name in now.sources]
    if both != [name for name in now.sources if name in before.sources]:
        lines.append(f"the order of the sources: {', '.join(before.sources)}, now {', '.join(now.sources)}")
    return lines


def shard_changes(before: Mapping[str, Shard], now: Mapping[str, Shard], *, rows: bool = True) -> list[str]:
    """What differs between the shards of one source, a line for each kind of change.

    Args:
        before, now: shards by name.
        rows: whether both were indexed with the same settings, so that other rows mean other bytes.
    """

    def differ(name: str) -> bool:
        one, other = before[name], now[name]
        return one != other if rows else one[0] != other[0]

    both = [name for name in before if name in now]
    found = {
        "added": [name for name in now if name not in before],
        "removed": [name for name in before if name not in now],
        "replaced": [f"{name} ({_difference(before[name], now[name])})" for name in both if differ(name)],
    }
    return [f"{_counted(len(names))} {what}: {_named(names)}" for what, names in found.items() if names]


def manifest_changes(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line, where the shards of a source have changed between two manifests of the same settings; else none."""
    decoded = ({one["name"]: one["decoded"] for one in manifest["shards"]} for manifest in (before, now))
    one, other = decoded
    same = all(one[shard] == other[shard] for shard in one.keys() & other.keys())
    found = shard_changes(shards_of(before), shards_of(now), rows=same)
    return [f"data: source {name} has changed since it was indexed: {'; '.join(found)}"] if found else []


def _difference(before: Shard, now: Shard) -> str:
    pairs = zip(("bytes", "samples", "rejected"), before, now, strict=False)
    words = [
        f"{'remote' if old is None else f'{old} {what}'}, now {'remote' if new is None else new}"
        for what, old, new in pairs
        if old != new
    ]
    return "; ".join(words) or "as many bytes and samples, others than before"


def _counted(number: int) -> str:
    return f"{number:,} shard" if number == 1 else f"{number:,} shards"


def _named(names: Sequence[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest:,} more" if rest > 0 else "")
