"""All records, read once before anything is written: which can be used, which media they show, what is wrong."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vl3train.data.prepare.annotated_records import AnnotatedRecords
from vl3train.data.prepare.rejections import Rejection
from vl3train.data.records.media_files import MediaFile
from vl3train.data.records.record_files import source_problems
from vl3train.finetuning.data.split import Item


@dataclass(slots=True)
class Records:
    """What files of records hold."""

    source: AnnotatedRecords
    items: list[Item] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)

    def only(self, places: Sequence[str]) -> AnnotatedRecords:
        """The same source with the records at these places."""
        return replace(self.source, only=frozenset(places))


def read_records(*sources: Sequence[str], media_roots: Sequence[str]) -> list[Records]:
    """Read every record of each list of files, and find its media.

    Media are told apart by their bytes, over all lists: the same clip under two names is one medium. Only files of
    equal size are read for it.

    Raises:
        ValueError: files are missing or of another kind, all of which are named; or there is no record.
    """
    if problems := source_problems([file for files in sources for file in files]):
        raise ValueError("\n".join(problems))
    read = [_read(files, media_roots) for files in sources]
    names = _names([one for _, shown in read for flat in shown for one in flat])
    for records, shown in read:
        records.items = [
            replace(item, media=tuple(names[one] for one in flat))
            for item, flat in zip(records.items, shown, strict=True)
        ]
    return [records for records, _ in read]


def _read(files: Sequence[str], media_roots: Sequence[str]) -> tuple[Records, list[list[_Medium]]]:
    """The records, and the media of each of their items, which have no names yet."""
    records = Records(AnnotatedRecords(tuple(files), media_folders(files, media_roots)))
    shown: list[list[_Medium]] = []
    for where, found in records.source.read(records.ignored):
        if isinstance(found, str):
            records.rejected.append(Rejection(where, found))
            continue
        conversation, media = found
        flat = [_medium(one) for medium in media for one in (medium.pictures or (medium,))]
        named = hashlib.sha256(conversation.to_json())
        for one in flat:
            named.update(f"\0{one.name}".encode(errors="surrogateescape"))
        records.items.append(Item(where, named.hexdigest(), ()))
        shown.append(flat)
    if not records.items and not records.rejected:
        raise ValueError(f"no records in {', '.join(files)}")
    return records, shown


def media_folders(files: Sequence[str], media_roots: Sequence[str]) -> tuple[Path, ...]:
    """Folders that media may lie in: those that are given, else the present one and those of the files."""
    if media_roots:
        return tuple(Path(root).expanduser() for root in media_roots)
    parents = [Path(file.rpartition(":")[2]).resolve().parent for file in files if not file.startswith("hf:")]
    return tuple(dict.fromkeys([Path.cwd(), *parents]))


@dataclass(frozen=True, slots=True)
class _Medium:
    """A picture or clip: its file as it lies, or a digest of bytes that a data set holds itself."""

    name: str  # as the record has it
    file: str = ""
    size: int = 0
    digest: str = ""


def _medium(medium: MediaFile) -> _Medium:
    if medium.location is None:
        assert medium.data is not None, "AnnotatedRecords has found the file"
        digest = hashlib.sha256(medium.data).hexdigest()
        return _Medium(medium.path or digest, size=len(medium.data), digest=digest)
    file = os.path.realpath(medium.location)
    return _Medium(medium.path, file=file, size=os.stat(file).st_size)


def _names(media: Sequence[_Medium]) -> dict[_Medium, str]:
    """One name for each medium, equal where the bytes are equal."""
    by_size: defaultdict[int, set[str]] = defaultdict(set)
    for one in media:
        by_size[one.size].add(one.file or one.digest)
    digests: dict[str, str] = {}
    found = {}
    for one in media:
        if one.file and len(by_size[one.size]) > 1 and one.file not in digests:
            with open(one.file, "rb") as file:
                digests[one.file] = hashlib.file_digest(file, "sha256").hexdigest()
        found[one] = one.digest or digests.get(one.file, one.file)
    return found
