"""Annotations and media become .tar shards that plain webdataset reads. The only door to webdataset."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from webdataset.writer import TarWriter

from vl3train.contracts.files import whole_folder
from vl3train.contracts.strict_json import json_text
from vl3train.data.media.picture_lists import LIST_SUFFIX
from vl3train.data.prepare.annotated_records import AnnotatedRecords, medium_bytes
from vl3train.data.prepare.check_media import MediaCheck, check_media
from vl3train.data.prepare.record_families import FamilySizes, Member
from vl3train.data.prepare.rejections import REJECTED_FILE, RejectedRecordsError, Rejection
from vl3train.data.records.media_files import MediaFile
from vl3train.data.records.record_files import source_problems
from vl3train.data.shards.several_records import join_records
from vl3train.data.shards.tar_headers import CONVERSATION_PART


@dataclass(frozen=True, slots=True)
class ShardReport:
    """What became of every record: ``num_written + len(rejected)`` is their number."""

    num_written: int
    num_shards: int
    rejected: tuple[Rejection, ...]
    ignored: Counter[str]  # keys that were not read, and in how many usable records
    remarks: Counter[
        str
    ]  # what is odd or lost of images, and in how many records; known where they are decoded


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What would become of every record."""

    num_records: int
    rejected: list[Rejection]
    ignored: Counter[str]
    remarks: Counter[str]


def check_annotations(
    records: AnnotatedRecords,
    *,
    progress: Callable[[str, int], None],
    media_check: MediaCheck | None = None,
    families: FamilySizes | None = None,
) -> CheckReport:
    """Read every record as ``write_shards`` would, and write nothing.

    With ``media_check`` media are read and checked; without it, only whether their files are there. ``families``
    counts the usable records.

    Raises:
        ValueError: there is no record; files are missing or of another kind, all of which are named.
    """
    if problems := source_problems(records.annotations):
        raise ValueError("\n".join(problems))
    rejected: list[Rejection] = []
    num_records = 0
    ignored: Counter[str] = Counter()
    remarks: Counter[str] = Counter()
    checked = records.read(ignored)
    if media_check is not None:
        checked = check_media(checked, media_check, remarks)
    for where, found in checked:
        num_records += 1
        if isinstance(found, str):
            rejected.append(Rejection(where, found))
        elif families is not None:
            families.count(*found)
        progress("checking", num_records)
    if not num_records:
        raise ValueError(f"no records in {', '.join(records.annotations)}")
    return CheckReport(num_records, rejected, ignored, remarks)


def write_shards(
    records: AnnotatedRecords,
    out_dir: Path,
    *,
    max_samples: int,
    max_bytes: int,
    skip_rejected: bool,
    progress: Callable[[str, int], None],
    media_check: MediaCheck | None = None,
    share_media: bool = False,
) -> ShardReport:
    """Check every record, then write the usable ones as ``out_dir/shard-000000.tar`` and so on.

    Members are ``KEY.json`` and the media ``KEY.0.jpg``, ``KEY.1.mp4`` with their bytes untouched. The folder
    appears under its name only when it is complete. ``progress(what, records)`` is called after each record.

    Args:
        records: the annotations and their media.
        out_dir: a folder that does not exist, or is empty.
        max_samples: of one shard.
        max_bytes: of media in one shard; a shard closes when it has reached one of the two.
        skip_rejected: write the usable records where some are rejected; REJECTED_FILE lists those with the reasons.
        media_check: check the media of every record first; None: only whether their files are there.
        share_media: write the records of a family (data/records/families.py) as one member, with their media once.

    Raises:
        FileExistsError: ``out_dir`` holds something already.
        RejectedRecordsError: records are rejected and ``skip_rejected`` is not set, or no usable one is left.
    """
    out_dir = out_dir.resolve()  # a link to a folder of a larger disk stays one
    if out_dir == Path.cwd():
        raise ValueError(f"--out {out_dir} is the folder you are in, and would be replaced; name another")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FileExistsError(f"{out_dir} exists already and is left as it is; choose another folder")
    families = FamilySizes()
    counted = families if share_media else None
    report = check_annotations(records, progress=progress, media_check=media_check, families=counted)
    num_records, rejected = report.num_records, report.rejected
    if (rejected and not skip_rejected) or len(rejected) == num_records:
        raise RejectedRecordsError(rejected, num_records)

    rejected_places = {rejection.where for rejection in rejected}
    usable = (
        found
        for where, found in records.read()
        if not isinstance(found, str) and where not in rejected_places
    )
    members = families.together(usable)
    num_written = num_members = num_shards = 0
    with whole_folder(out_dir) as partial:
        while True:
            shard = partial / f"shard-{num_shards:06d}.tar"
            limits = max_samples, max_bytes
            count, of_records = _write_shard(shard, members, (num_members, num_written), limits, progress)
            if not count:
                shard.unlink()
                break
            num_members, num_written = num_members + count, num_written + of_records
            num_shards += 1
        if num_written + len(rejected) != num_records:
            raise RuntimeError(
                f"annotations changed while they were read: {num_written} of {num_records} written"
            )
        if rejected:
            lines = [
                json_text({"where": rejection.where, "reason": rejection.reason}) for rejection in rejected
            ]
            (partial / REJECTED_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ShardReport(num_written, num_shards, tuple(rejected), report.ignored, report.remarks)


def _write_shard(
    shard: Path,
    members: Iterator[Member],
    first: tuple[int, int],
    limits: tuple[int, int],
    progress: Callable[[str, int], None],
) -> tuple[int, int]:
    """Fill one shard; how many members and records went in. ``first`` are those before it."""
    count = num_records = size = 0
    max_samples, max_bytes = limits
    with shard.open("wb") as file:
        # A fixed time and no names of users: the same input gives the same bytes.
        with TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as writer:
            while num_records < max_samples and size < max_bytes:
                found = next(members, None)
                if found is None:
                    break
                conversations, media = found
                names = [part_name(number, medium) for number, medium in enumerate(media)]
                parts = {CONVERSATION_PART: join_records([one.to_json(names) for one in conversations])}
                for name, medium in zip(names, media, strict=True):
                    parts[name] = medium_bytes(medium)
                writer.write({"__key__": f"{first[0] + count:09d}", **parts})
                count, size = count + 1, size + sum(map(len, parts.values()))
                num_records += len(conversations)
                progress("writing", first[1] + num_records)
        file.flush()
        os.fsync(file.fileno())
    return count, num_records


def write_members(shard: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write samples, each a key and its members, into one shard."""
    with shard.open("wb") as file:
        with TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as writer:
            for key, members in samples:
                writer.write({"__key__": key, **members})
        file.flush()
        os.fsync(file.fileno())


def part_name(number: int, medium: MediaFile) -> str:
    """What a sample's medium is called in the shard, after the key; of bytes without a name, by what they are.

    >>> part_name(1, MediaFile("a/b/clip.MP4", "video")), part_name(0, MediaFile("", "image", b"GIF89a"))
    ('1.mp4', '0.gif')
    """
    return f"{number}.{LIST_SUFFIX if medium.pictures else medium.suffix or medium.kind}"
