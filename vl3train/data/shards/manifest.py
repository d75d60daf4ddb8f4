"""Which folders of shards have an index that fits them: its folder, its manifest, and what differs if none does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from vl3train.contracts.records import RenderSettings
from vl3train.data.media.clips import DecodeLimits
from vl3train.data.shards.remote import listed_shards

MANIFEST = "manifest.json"


class MissingIndexError(ValueError):
    """There is no index for these shards and settings, or the shards have changed since."""


def index_folder(shards: Path, settings: RenderSettings) -> Path:
    """Where the index of a folder of shards lies."""
    return shards / f"index-{settings.fingerprint()}"


def shard_files(shards: Path) -> list[Path]:
    """The shards of a folder, by name.

    Raises:
        MissingIndexError: the folder holds none.
    """
    found = {path.name: path for path in shards.glob("*.tar")}
    found |= {name: shards / name for name in listed_shards(shards)}
    if not found:
        raise MissingIndexError(f"{shards}: no .tar shards; make them with `vl3train shards`")
    return [found[name] for name in sorted(found)]


def read_manifest(shards: Path, settings: RenderSettings, limits: DecodeLimits) -> dict[str, Any]:
    """The manifest of a complete index that fits the shards as they are now.

    Raises:
        MissingIndexError: with what is missing or differs.
    """
    folder = index_folder(shards, settings)
    way_out = "run `vl3train index`, or let training build it"
    if not (folder / MANIFEST).is_file():
        others = [path.parent.name for path in shards.glob(f"index-*/{MANIFEST}")]
        made_for = _differing_settings(shards / others[0], settings) if others else ""
        raise MissingIndexError(f"{shards}: no index for these settings{made_for}; {way_out}")
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest["limits"] != dataclasses.asdict(limits):
        raise MissingIndexError(
            f"{shards}: indexed with limits {manifest['limits']}, now {limits}; {way_out}"
        )
    indexed = {shard["name"]: shard["bytes"] for shard in manifest["shards"]}
    there = {path.name: path.stat().st_size if path.is_file() else None for path in shard_files(shards)}
    if indexed != there:
        changed = min(name for name, _ in set(indexed.items()) ^ set(there.items()))
        raise MissingIndexError(
            f"{shards}: shards have changed since they were indexed, {changed} first; {way_out}"
        )
    return manifest


def _differing_settings(folder: Path, settings: RenderSettings) -> str:
    """What an index that is there was made with instead."""
    made_with = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["settings"]
    now = dataclasses.asdict(settings)
    differing = [
        f"{key}={made_with.get(key)}, now {now[key]}" for key in now if made_with.get(key) != now[key]
    ]
    return f" ({folder.name} was made with {'; '.join(differing)})"
