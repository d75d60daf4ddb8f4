"""Which folders of shards have an index that fits them: its folder, its manifest, and what differs if none does."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl3train.contracts.records import RenderSettings
from vl3train.data.media.clips import DecodeLimits
from vl3train.data.sealed import DamagedFileError, file_digest, read_sealed_json
from vl3train.data.shards.remote import listed_shards

MANIFEST = "manifest.json"


class MissingIndexError(ValueError):
    """There is no index for these shards and settings, or the shards have changed since."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexPlace:
    """A folder of shards, what its index is made with, and where that lies."""

    shards: Path
    settings: RenderSettings
    limits: DecodeLimits
    index_dir: Path | None = None
    """``data.index_dir``: where the indexes of all sources lie. None: each beside its shards."""

    @property
    def folder(self) -> Path:
        """Of the index. Below ``index_dir`` it bears the name of the shards' folder and a digest of its path."""
        name = f"index-{self.settings.fingerprint()}"
        if self.index_dir is None:
            return self.shards / name
        shards = self.shards.resolve()
        return (
            self.index_dir / f"{shards.name}-{hashlib.sha256(str(shards).encode()).hexdigest()[:12]}" / name
        )


WAY_OUT = "run `vl3train index`, or let training build it"


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


def read_manifest(place: IndexPlace) -> dict[str, Any]:
    """The manifest of a complete index that fits the shards as they are now.

    Raises:
        MissingIndexError: with what is missing, differs or is damaged.
    """
    shards, folder = place.shards, place.folder
    if not (folder / MANIFEST).is_file():
        made_for = _differing_settings(place)
        raise MissingIndexError(f"{shards}: no index for these settings{made_for}; {WAY_OUT}")
    try:
        manifest = read_sealed_json(folder / MANIFEST)
    except DamagedFileError as error:
        raise MissingIndexError(f"{error}; {WAY_OUT}") from error
    if manifest["limits"] != dataclasses.asdict(place.limits):
        raise MissingIndexError(
            f"{shards}: indexed with limits {manifest['limits']}, now {place.limits}; {WAY_OUT}"
        )
    indexed = {shard["name"]: shard["bytes"] for shard in manifest["shards"]}
    there = {path.name: path.stat().st_size if path.is_file() else None for path in shard_files(shards)}
    if indexed != there:
        changed = min(name for name, _ in set(indexed.items()) ^ set(there.items()))
        raise MissingIndexError(
            f"{shards}: shards have changed since they were indexed, {changed} first; {WAY_OUT}"
        )
    return manifest


def rows_path(folder: Path, shard: str) -> Path:
    """Where the rows of a shard lie in an index."""
    return folder / f"{shard}.parquet"


def check_rows(folder: Path, entry: dict[str, Any]) -> None:
    """Compare a file of rows with its digest, before a library reads it: a damaged one can end the process.

    Raises:
        MissingIndexError: it is gone or damaged.
    """
    path = rows_path(folder, entry["name"])
    try:
        if file_digest(path) == entry["file_sha256"]:
            return
        raise MissingIndexError(f"{path} is damaged; {WAY_OUT}")
    except OSError as error:
        raise MissingIndexError(f"{path} cannot be read: {error.strerror}; {WAY_OUT}") from error


def _differing_settings(place: IndexPlace) -> str:
    """What an index that is there was made with instead."""
    now = dataclasses.asdict(place.settings)
    for path in sorted(place.folder.parent.glob(f"index-*/{MANIFEST}")):
        try:
            made_with = read_sealed_json(path)["settings"]
        except DamagedFileError:  # of an earlier build, or damaged; it is not what is asked for
            continue
        differing = [
            f"{key}={made_with.get(key)}, now {now[key]}" for key in now if made_with.get(key) != now[key]
        ]
        return f" ({path.parent.name} was made with {'; '.join(differing)})"
    return ""
