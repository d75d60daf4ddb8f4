"""The bytes of some members of a shard, by offset: one open file or one request, nothing of the rest is read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vl3train.contracts.progress.record import progress
from vl3train.contracts.records import SampleError
from vl3train.data.shards.patience import Patience
from vl3train.data.shards.remote import RangeCache, RemoteError, address_of, read_range
from vl3train.data.shards.tar_headers import Part

_patience = Patience()


def read_parts(
    shard: Path, parts: Sequence[Part], cache: RangeCache | None = None, *, retry_seconds: float = 0.0
) -> dict[str, bytes]:
    """The bytes of some parts, by name; of a remote shard with one request for all of them.

    Args:
        shard: a file, or the name of one that the folder's list of remote shards has.
        parts: which.
        cache: of remote shards.
        retry_seconds: how long a local shard that cannot be read is tried again (data/shards/patience.py); remote ones
            have tries of their own.

    Raises:
        SampleError: the file ends before them, or cannot be read.
    """
    first = min((part.offset for part in parts), default=0)
    size = max((part.offset + part.size for part in parts), default=0) - first
    progress.place(f"{shard}, bytes {first} to {first + size}")
    if parts and (address := address_of(shard)) is not None:
        try:
            span = memoryview(read_range(address, first, size, cache))
        except RemoteError as error:
            raise SampleError(str(error)) from error
        return {part.name: bytes(span[part.offset - first :][: part.size]) for part in parts}
    try:
        data = _patience.read(shard, lambda: _read_local(shard, parts), retry_seconds)
    except OSError as error:
        raise SampleError(f"{shard} cannot be read: {error}") from error
    for part in parts:
        if len(data[part.name]) != part.size:
            raise SampleError(f"part {part.name}: {shard} ends before it does")
    return data


def _read_local(shard: Path, parts: Sequence[Part]) -> dict[str, bytes]:
    file = os.open(shard, os.O_RDONLY)
    try:
        return {part.name: os.pread(file, part.size, part.offset) for part in parts}
    finally:
        os.close(file)
