"""What lies where in a .tar shard, from its headers alone; whatever a reader could silently lose is refused.

Plain webdataset stops without a word at a damaged header, merges keys that contain dots, and yields half samples
when members of one key are apart. Here each of these is an error that names the shard and the place.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = 512
KEY = re.compile(r"(?:\./)?((?:[^/]+/)*[^/.]+)\.([^/]+)")
"""Key and part of a member's name: webdataset splits at the first dot of the last component."""

CONVERSATION_PART = "json"
MEDIA_PART = re.compile(r"\d+\.[a-z0-9]+")
REGULAR_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE)
EXTENSION_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)


class BadShard(ValueError):  # noqa: N818 - named like BadSample: it is refused, with the reason
    """A shard whose structure cannot be trusted. Nothing of it is used."""


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a sample: ``json`` or a medium, ``0.jpg``, ``1.mp4``."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class ShardSample:
    """All parts of one key."""

    key: str
    parts: tuple[Part, ...]

    def fault(self) -> str | None:
        """Why these parts are no sample, or None."""
        names = [part.name for part in self.parts]
        if CONVERSATION_PART not in names:
            return "no .json member: the conversation is missing"
        if len(set(names)) < len(names):
            return "a member comes twice"
        foreign = [name for name in names if name != CONVERSATION_PART and not MEDIA_PART.fullmatch(name)]
        return f"member .{foreign[0]} is neither .json nor a numbered medium like .0.jpg" if foreign else None


def shard_samples(shard: Path) -> list[ShardSample]:
    """The samples of a shard in their order.

    Raises:
        BadShard: truncated or damaged; links, absolute names or ``..``; members of one key apart.
    """
    samples: list[ShardSample] = []
    seen: set[str] = set()
    key, parts = "", list[Part]()
    for name, offset, size in _regular_members(shard):
        match = KEY.fullmatch(name)
        if match is None or ".." in name.split("/"):
            raise BadShard(f"{shard}: member {name!r}: names must be relative, KEY.PART, without '..'")
        if match[1] != key:
            if parts:
                samples.append(ShardSample(key, tuple(parts)))
            key, parts = match[1], []
            if key in seen:
                raise BadShard(f"{shard}: members of key {key!r} are not adjacent; write the shard again")
            seen.add(key)
        parts.append(Part(match[2], offset, size))
    if parts:
        samples.append(ShardSample(key, tuple(parts)))
    return samples


def _regular_members(shard: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every regular file; directories are passed over, anything else is refused."""
    total = shard.stat().st_size
    position, long_name = 0, ""
    long_size: int | None = None
    with shard.open("rb") as file:
        while True:
            file.seek(position)
            block = file.read(BLOCK)
            if len(block) < BLOCK:
                raise BadShard(f"{shard}: cut off at byte {position}: no end mark; write or copy it again")
            if not any(block):
                return
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                raise BadShard(f"{shard}: damaged header at byte {position}: {error}") from error
            name, size = long_name or header.name, header.size if long_size is None else long_size
            start = position + BLOCK
            if start + size > total:
                raise BadShard(f"{shard}: cut off inside {name!r}, {start + size - total} bytes are missing")
            position = start + -(-size // BLOCK) * BLOCK
            if header.type in EXTENSION_TYPES:  # a long name or size for the next member
                body = file.read(size)
                if header.type == tarfile.GNUTYPE_LONGNAME:
                    long_name = body.rstrip(b"\0").decode("utf-8", "surrogateescape")
                elif header.type == tarfile.XHDTYPE:
                    fields = _pax_fields(body)
                    long_name = fields.get("path", "")
                    long_size = int(fields["size"]) if "size" in fields else None
                continue
            if header.type in REGULAR_TYPES:
                yield name, start, size
            elif header.type != tarfile.DIRTYPE:
                raise BadShard(
                    f"{shard}: member {name!r} is a link or device; shards hold regular files only"
                )
            long_name, long_size = "", None


def _pax_fields(body: bytes) -> dict[str, str]:
    """``LENGTH KEY=VALUE`` lines of a pax header."""
    fields, position = {}, 0
    while match := re.compile(rb"(\d+) ([^=]+)=").match(body, position):
        end = position + int(match[1])
        fields[match[2].decode()] = body[match.end() : end - 1].decode("utf-8", "surrogateescape")
        position = max(end, match.end())
    return fields
