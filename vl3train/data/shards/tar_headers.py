"""What lies where in a .tar shard, from its headers alone. Damaged places are rejected, the rest stays usable.

Plain webdataset stops without a word at a damaged header, merges keys that contain dots, and yields half samples
when members of one key are apart. Here each of these is a row of the index with its place and its reason.
"""

from __future__ import annotations

import mmap
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = 512
MAGIC_AT = 257
"""Where ``ustar`` begins in a header."""

CONVERSATION_PART = "json"
CAPTION_PART = "txt"
IMAGE_SUFFIXES = {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "image"}
CLIP_SUFFIXES = {"mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "ts", "flv", "wmv", "ogv", "video"}
DOCUMENT_SUFFIXES = {"pdf", "djvu", "ps", "eps", "xps", "docx"}
MEDIA_PART = re.compile(
    r"(?:[a-z_-]*\d+\.)?(?:" + "|".join(sorted(IMAGE_SUFFIXES | CLIP_SUFFIXES)) + r")|\d+\.[a-z0-9]+"
)
"""``0.jpg`` as `vl3train shards` writes it, ``jpg`` or ``image_0.jpg`` as others do. Nothing else is read."""

REGULAR_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE)
EXTENSION_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a sample: ``json``, ``txt`` or a medium, ``0.jpg``, ``1.mp4``."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class ShardSample:
    """All parts of one key; or, without parts, a place of the shard that cannot be read: key ``@BYTE``."""

    key: str
    parts: tuple[Part, ...]
    rejection: str | None = None  # why the index rejects it
    ignored: tuple[str, ...] = ()  # its members that are neither text nor media; never opened


@dataclass(frozen=True, slots=True)
class _RejectedPlace:
    position: int
    reason: str


@dataclass(slots=True)
class _Members:
    """Members of one key, as they are found."""

    parts: list[Part] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    apart_at: int | None = None

    def rejection(self) -> str | None:
        names = [part.name for part in self.parts]
        if self.apart_at is not None:
            return f"its members are not adjacent: others come again at byte {self.apart_at}"
        if twice := sorted({name for name in names if names.count(name) > 1}):
            return f"member .{twice[0]} comes twice"
        papers = [name for name in self.ignored if name.rpartition(".")[2] in DOCUMENT_SUFFIXES]
        if papers and not any(MEDIA_PART.fullmatch(name) for name in names):
            return (
                f"member .{papers[0]}: documents are not opened; render each page to a picture, KEY.0.jpg, KEY.1.jpg "
                "and so on, and write the text into KEY.txt"
            )
        if not {CONVERSATION_PART, CAPTION_PART} & set(names):
            return f"no .json or .txt member: the conversation is missing; there is {[*names, *self.ignored]}"
        return None


def shard_samples(shard: Path) -> list[ShardSample]:
    """The samples of a shard in their order, those included that cannot be used. Every byte is accounted for."""
    found = list(_read_headers(shard))
    members = [one for one in found if isinstance(one, Part)]
    places = [one for one in found if isinstance(one, _RejectedPlace)]
    stems = [name.rpartition(".")[0] for name in (member.name.removeprefix("./") for member in members)]
    keys = {
        stem
        for stem, member in zip(stems, members, strict=True)
        if member.name.lower().endswith((f".{CONVERSATION_PART}", f".{CAPTION_PART}"))
    }
    samples: dict[str, _Members] = {}
    current = None
    for member in members:
        key, part = split_name(member.name, keys)
        if not key or key.endswith("/"):
            places.append(
                _RejectedPlace(member.offset - BLOCK, f"member {member.name!r}: a name is KEY.PART")
            )
            continue
        sample = samples.setdefault(key, _Members())
        if key != current and (sample.parts or sample.ignored):
            sample.apart_at = member.offset - BLOCK
        current = key
        if part in (CONVERSATION_PART, CAPTION_PART) or MEDIA_PART.fullmatch(part):
            sample.parts.append(Part(part, member.offset, member.size))
        else:
            sample.ignored.append(part)
    return [
        *(
            ShardSample(key, tuple(sample.parts), sample.rejection(), tuple(sample.ignored))
            for key, sample in samples.items()
        ),
        *(ShardSample(f"@{place.position}", (), place.reason) for place in places),
    ]


def split_name(name: str, keys: set[str]) -> tuple[str, str]:
    """Key and part of a member's name. Keys may hold dots: ``keys`` are those with a .json or .txt member.

    >>> split_name("a/v1.5_7.0.jpg", {"a/v1.5_7"}), split_name("7.0.jpg", set())
    (('a/v1.5_7', '0.jpg'), ('7', '0.jpg'))
    """
    name = name.removeprefix("./")
    folder, slash, last = name.rpartition("/")
    words = last.split(".")
    for cut in range(len(words) - 1, 0, -1):
        key = folder + slash + ".".join(words[:cut])
        if key in keys:
            return key, ".".join(words[cut:]).lower()
    return folder + slash + words[0], ".".join(words[1:]).lower()  # as webdataset splits


def _read_headers(shard: Path) -> Iterator[Part | _RejectedPlace]:
    """Every regular file, by its full name, and every rejected place. Directories are neither."""
    total = shard.stat().st_size
    if total == 0:
        yield _RejectedPlace(0, "the shard is empty")
        return
    with shard.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        position, long_name, ended = 0, "", False
        long_size: int | None = None
        while position < total or not ended:
            block = content[position : position + BLOCK]
            if len(block) < BLOCK:
                yield _RejectedPlace(
                    position, f"cut off at byte {position}: no end mark; copy the shard again"
                )
                return
            if not any(block):
                ended = True  # but another archive may be appended
                position = _next_header(content, position + BLOCK)
                continue
            ended = False
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                following = _next_header(content, position + BLOCK)
                lost = (
                    "nothing behind it can be read"
                    if following >= total
                    else f"the next readable member begins at byte {following}"
                )
                yield _RejectedPlace(position, f"damaged header at byte {position}: {error}; {lost}")
                if following >= total:
                    return
                position, long_name, long_size = following, "", None
                continue
            name, size = long_name or header.name, header.size if long_size is None else long_size
            start, at = position + BLOCK, position
            if start + size > total:
                missing = start + size - total
                yield _RejectedPlace(
                    at, f"cut off inside {name!r}, {missing} bytes are missing; copy the shard again"
                )
                return
            position = start + -(-size // BLOCK) * BLOCK
            if header.type in EXTENSION_TYPES:  # a long name or size for the next member
                body = content[start : start + size]
                if header.type == tarfile.GNUTYPE_LONGNAME:
                    long_name = body.rstrip(b"\0").decode("utf-8", "surrogateescape")
                elif header.type == tarfile.XHDTYPE:
                    fields = _pax_fields(body)
                    long_name = fields.get("path", "")
                    long_size = int(fields["size"]) if fields.get("size", "").isdigit() else None
                continue
            long_name, long_size = "", None
            if header.type not in REGULAR_TYPES:
                if header.type != tarfile.DIRTYPE:
                    yield _RejectedPlace(at, f"member {name!r} is a link or device; it is not followed")
            elif name.startswith("/") or ".." in name.split("/"):
                yield _RejectedPlace(at, f"member {name!r}: names must be relative, without '..'")
            else:
                yield Part(name, start, size)


def _next_header(content: mmap.mmap, position: int) -> int:
    """Where the next readable header begins at or behind ``position``; the size of the file without one."""
    found = content.find(b"ustar", position)
    while found >= 0:
        start = found - MAGIC_AT
        if start >= position and start % BLOCK == 0:
            try:
                tarfile.TarInfo.frombuf(content[start : start + BLOCK], "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                pass
            else:
                return start
        found = content.find(b"ustar", found + 1)
    return len(content)


def _pax_fields(body: bytes) -> dict[str, str]:
    """``LENGTH KEY=VALUE`` lines of a pax header."""
    fields, position = {}, 0
    while match := re.compile(rb"(\d+) ([^=]+)=").match(body, position):
        end = position + int(match[1])
        value = body[match.end() : end - 1]
        fields[match[2].decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        position = max(end, match.end())
    return fields
