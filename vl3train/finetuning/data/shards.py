"""The data folder of a fine-tuning: shards of training and held-out samples, and what they were made from."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vl3train.contracts.files import write_whole
from vl3train.contracts.strict_json import json_text
from vl3train.data.prepare.annotated_records import AnnotatedRecords
from vl3train.data.prepare.rejections import Rejection, describe_ignored
from vl3train.data.prepare.write_shards import write_shards
from vl3train.finetuning.data.samples import Records, read_records
from vl3train.finetuning.data.split import choose_held_out, shared_media, wanted_samples

FORMAT = 1
"""Increased when the same records give other shards."""
MADE_FROM = "made_from.json"
RECIPE_MARK = "Made by vl3train finetune from"
SAMPLES_PER_SHARD, BYTES_PER_SHARD = 1000, 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Which records become which samples."""

    training: AnnotatedRecords
    held_out: AnnotatedRecords | None
    num_training: int
    num_held_out: int
    digest: str  # of all that the shards are made from
    rejected: tuple[Rejection, ...]
    remarks: tuple[str, ...]
    problems: tuple[str, ...]  # why nothing can be made of it


def split_records(files: Sequence[str], media_roots: Sequence[str], held_out: str) -> Split:
    """Read the records, and say which are held out: a share or number of them, or those of another file.

    Raises:
        ValueError: a file is missing or of another kind.
    """
    is_file = wanted_samples(held_out, 1) is None
    records, *others = read_records(files, *([[held_out]] if is_file else []), media_roots=media_roots)
    items, problems = records.items, []
    remarks = describe_ignored(records.ignored)
    wanted = wanted_samples(held_out, len(items))
    rejected = list(records.rejected)
    other: Records | None = None
    if wanted is None:
        [other] = others
        rejected += other.rejected
        if both := shared_media(items, other.items):
            places = ", ".join(item.where for item in both[:3])
            remarks.append(
                f"{len(both)} samples of {held_out} show a picture or clip that is trained on too (as {places}): their "
                "figures say less. --held-out 5% chooses samples whose media are not trained on"
            )
        kept, chosen = items, other.items
    else:
        numbers = choose_held_out(items, wanted)
        kept = [item for number, item in enumerate(items) if number not in numbers]
        chosen = [items[number] for number in sorted(numbers)]
        if len(chosen) < wanted:
            remarks.append(
                f"{len(chosen)} samples are held out and not {wanted}: the other samples share pictures or clips with "
                "too many others"
            )
    if not kept:
        problems.append("no record is left to train on")
    source = records.source if other is None else other.source
    return Split(
        training=records.only([item.where for item in kept]),
        held_out=Records(source).only([item.where for item in chosen]) if chosen else None,
        num_training=len(kept),
        num_held_out=len(chosen),
        digest=_digest([*((False, item) for item in kept), *((True, item) for item in chosen)]),
        rejected=tuple(rejected),
        remarks=tuple(remarks),
        problems=tuple(problems),
    )


def _digest(items: Sequence[tuple[bool, object]]) -> str:
    """Of text, names and content of every sample. Names of media stand for their bytes only where sizes are equal."""
    whole = hashlib.sha256(f"{FORMAT} {SAMPLES_PER_SHARD} {BYTES_PER_SHARD}".encode())
    for held_out, item in items:
        whole.update(repr((held_out, item.key, [_stamp(name) for name in item.media])).encode())  # type: ignore[attr-defined]
    return whole.hexdigest()


def _stamp(name: str) -> tuple[str, int, int]:
    """A medium by its name; of a file with its size and the time of its last change."""
    if not name.startswith("/"):
        return name, 0, 0
    found = Path(name).stat()
    return name, found.st_size, found.st_mtime_ns


def make_data(split: Split, folder: Path, progress: Callable[[str, int], None]) -> bool:
    """Write ``folder/train`` and ``folder/held_out``, unless they were made from the same; whether they were written.

    Data that this function made of other records are replaced.

    Raises:
        FileExistsError: the folder has something else.
    """
    if made_from(folder) == split.digest:
        return False
    if is_somebodys(folder):
        raise FileExistsError(f"{folder} has files that were not made from records; give another --out")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_whole(
        folder / MADE_FROM, json_text({"digest": "incomplete"})
    )  # it is ours also if we are killed now
    for name, records in (("train", split.training), ("held_out", split.held_out)):
        if records is not None:
            write_shards(
                records,
                folder / name,
                max_samples=SAMPLES_PER_SHARD,
                max_bytes=BYTES_PER_SHARD,
                skip_rejected=True,
                progress=progress,
            )
    content = {"digest": split.digest, "train": split.num_training, "held_out": split.num_held_out}
    write_whole(folder / MADE_FROM, json_text(content, indent=1))
    return True


def is_somebodys(folder: Path) -> bool:
    """Whether a folder has something that ``make_data`` did not write."""
    if not folder.exists():
        return False
    return not folder.is_dir() or (not (folder / MADE_FROM).is_file() and any(folder.iterdir()))


def made_from(folder: Path) -> str | None:
    """The digest of what the data in a folder were made from; None where none are complete."""
    try:
        return str(json.loads((folder / MADE_FROM).read_text(encoding="utf-8"))["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def recipe_text(name: str, split: Split, files: Sequence[str]) -> str:
    """The recipe of one source, the folders beside it."""
    about = json.dumps(f"{RECIPE_MARK} {', '.join(files)}.", ensure_ascii=False)
    held_out = "\n    held_out: data/held_out" if split.held_out is not None else ""
    return (
        f"name: {json.dumps(name)}\nabout: {about}\nsources:\n  - name: {json.dumps(name)}\n"
        f"    shards: data/train{held_out}\n"
    )
