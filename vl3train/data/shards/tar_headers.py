"""The samples of a .tar shard, from its headers alone. Damaged places are rejected, the rest stays usable.

Plain webdataset stops without a word at a damaged header, merges keys that contain dots, and yields half samples
when members of one key are apart. Here each of these is a row of the index with its place and its reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vl3train.data.shards.tar_members import Member, RejectedPlace, read_members, shown

CONVERSATION_PART = "json"
CAPTION_PART = "txt"
IMAGE_SUFFIXES = {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "image"}
CLIP_SUFFIXES = {"mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "ts", "flv", "wmv", "ogv", "video"}
DOCUMENT_SUFFIXES = {"pdf", "djvu", "ps", "eps", "xps", "docx"}
MEDIA_PART = re.compile(
    r"(?:[a-z_-]*\d+\.)?(?:" + "|".join(sorted(IMAGE_SUFFIXES | CLIP_SUFFIXES)) + r")|\d+\.[a-z0-9]+"
)
"""``0.jpg`` as `vl3train shards` writes it, ``jpg`` or ``image_0.jpg`` as others do. Nothing else is read."""

COMPANIONS = (".DS_Store", "Thumbs.db", "desktop.ini")
COMPANION_FOLDERS = re.compile(r"__MACOSX|\.AppleDouble|@eaDir|PaxHeaders?(?:\.\d+)?")
"""What operating systems, servers and tools that know no pax headers put beside files. It is passed over."""
MAX_PART_DOTS, MAX_FOLDERS = 16, 32
"""Looked at in a name, which may have thousands."""
SHOWN_NAMES = 8


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


@dataclass(slots=True)
class _Members:
    """Members of one key, as they are found."""

    parts: list[Part] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    apart_at: int | None = None
    damaged: str | None = None  # why one of its members, or a place between them, was rejected

    def rejection(self) -> str | None:
        names = [part.name for part in self.parts]
        counts = Counter(names)
        if self.damaged is not None:
            return self.damaged
        if self.apart_at is not None:
            return (
                f"its members are not adjacent: others come again at byte {self.apart_at}; pack the shard again with "
                "--sort=name"
            )
        if twice := [name for name, count in counts.items() if count > 1]:
            return f"member .{min(twice)} comes twice; pack the shard again with one of them"
        papers = [name for name in self.ignored if name.rpartition(".")[2] in DOCUMENT_SUFFIXES]
        if papers and not any(MEDIA_PART.fullmatch(name) for name in names):
            return (
                f"member .{papers[0]}: documents are not opened; render each page to a picture, KEY.0.jpg, KEY.1.jpg "
                "and so on, and write the text into KEY.txt"
            )
        if not {CONVERSATION_PART, CAPTION_PART} & set(names):
            there = [*names, *self.ignored][:SHOWN_NAMES]
            return f"no .json or .txt member: the conversation is missing; there is {there}; add KEY.json or KEY.txt"
        return None


def shard_samples(shard: Path) -> list[ShardSample]:
    """The samples of a shard in their order, those included that cannot be used. Every byte is accounted for.

    Raises:
        OSError: the file cannot be read.
    """
    found = read_members(shard)
    places = [one for one in found if isinstance(one, RejectedPlace)]
    names = {one.name for one in found if isinstance(one, Member)}
    accompanied = names | {parent for name in names if "/" in name for parent in _folders(name)}
    companions = {name for name in names if is_companion(name, accompanied)}
    keys = _keys((names - companions) | {place.name for place in places})
    samples: dict[str, _Members] = {}
    current, between = None, None
    for one in found:
        if isinstance(one, RejectedPlace):
            between = one  # of the same sample, if the next member is
        elif one.name not in companions:
            key, part = split_name(one.name, keys)
            if not key or key.endswith("/"):
                places.append(
                    RejectedPlace(one.at, f"member {shown(one.name)}: a name is KEY.PART; rename it")
                )
                continue
            sample = samples.setdefault(key, _Members())
            if key != current and (sample.parts or sample.ignored):
                sample.apart_at = one.at
            elif between is not None and not between.name and key == current:
                sample.damaged = between.reason
            current, between = key, None
            if is_read(part):
                sample.parts.append(Part(part, one.offset, one.size))
            else:
                sample.ignored.append(part)
    _pass_over(companions, samples, keys)
    for place in places:
        key, part = split_name(place.name, keys)
        if is_read(part) and key in samples:
            samples[key].damaged = place.reason
    return [
        *(
            ShardSample(key, tuple(sample.parts), sample.rejection(), tuple(sample.ignored))
            for key, sample in samples.items()
        ),
        *(ShardSample(f"@{place.at}", (), place.reason) for place in places),
    ]


def is_read(part: str) -> bool:
    """Whether a part is text or a medium. Others are counted and never opened."""
    return part in (CONVERSATION_PART, CAPTION_PART) or MEDIA_PART.fullmatch(part) is not None


def is_companion(name: str, names: Collection[str]) -> bool:
    """Whether a member is no file of the user: what a Mac and others write beside each file, and into each folder.

    Args:
        name: of the member.
        names: of all members, and of the folders they lie in.

    >>> is_companion("a/._7.jpg", {"a/7.jpg"}), is_companion("a/._7.jpg", ()), is_companion("a/.DS_Store", ())
    (True, False, True)
    """
    folder, slash, last = name.rpartition("/")
    if last in COMPANIONS or any(COMPANION_FOLDERS.fullmatch(word) for word in folder.split("/")):
        return True
    return last == "._." or (last.startswith("._") and folder + slash + last[2:] in names)


def _folders(name: str) -> Iterator[str]:
    """The folders that a member lies in."""
    words = name.split("/")
    return ("/".join(words[:count]) for count in range(1, min(len(words), MAX_FOLDERS)))


def _keys(names: Collection[str]) -> set[str]:
    """Keys of the samples that have a text. Others have no dots in theirs."""
    texts = (f".{CONVERSATION_PART}", f".{CAPTION_PART}")
    return {name.removeprefix("./").rpartition(".")[0] for name in names if name.lower().endswith(texts)}


def _pass_over(companions: Collection[str], samples: dict[str, _Members], keys: set[str]) -> None:
    """Count companions with the sample that they accompany, or with the first."""
    for name in sorted(companions) if samples else ():
        folder, slash, last = name.rpartition("/")
        is_double = last.startswith("._")
        key, _ = split_name(folder + slash + last.removeprefix("._"), keys)
        sample = samples.get(key) or next(iter(samples.values()))
        sample.ignored.append("._*" if is_double else last if last in COMPANIONS else "PaxHeader")


def split_name(name: str, keys: set[str]) -> tuple[str, str]:
    """Key and part of a member's name. Keys may hold dots: ``keys`` are those with a .json or .txt member.

    >>> split_name("a/v1.5_7.0.jpg", {"a/v1.5_7"}), split_name("7.0.jpg", set())
    (('a/v1.5_7', '0.jpg'), ('7', '0.jpg'))
    """
    name = name.removeprefix("./")
    folder, slash, last = name.rpartition("/")
    words = last.split(".")
    for cut in range(len(words) - 1, max(0, len(words) - 1 - MAX_PART_DOTS), -1):
        key = folder + slash + ".".join(words[:cut])
        if key in keys:
            return key, ".".join(words[cut:]).lower()
    return folder + slash + words[0], ".".join(words[1:]).lower()  # as webdataset splits
