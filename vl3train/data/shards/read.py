"""The bytes of some members of a shard, by offset: one open file or one request, nothing of the rest is read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vl3train.contracts.records import SampleError
from vl3train.data.shards.remote import RangeCache, RemoteError, address_of, read_range
from vl3train.data.shards.tar_headers import Part


def read_parts(shard: Path, parts: Sequence[Part], cache: RangeCache | None = None) -> dict[str, bytes]:
    """The bytes of some parts, by name; of a remote shard with one request for all of them.

    Raises:
        SampleError: the file ends before them, or cannot be read.
    """
    if parts and (address := address_of(shard)) is not None:
        first = min(part.offset for part in parts)
        size = max(part.offset + part.size for part in parts) - first
        try:
            span = memoryview(read_range(address, first, size, cache))
        except RemoteError as error:
            raise SampleError(str(error)) from error
        return {part.name: bytes(span[part.offset - first :][: part.size]) for part in parts}
    try:
        file = os.open(shard, os.O_RDONLY)
    except OSError as error:
        raise SampleError(f"{shard} cannot be opened: {error}") from error
    try:
        data = {part.name: os.pread(file, part.size, part.offset) for part in parts}
    except OSError as error:
        raise SampleError(f"{shard} cannot be read: {error}") from error
    finally:
        os.close(file)
    for part in parts:
        if len(data[part.name]) != part.size:
            raise SampleError(f"part {part.name}: {shard} ends before it does")
    return data
