"""What is known of every sample before it is read: where it lies, its lengths, its checksum.

One parquet file for each shard, its entry of the manifest beside it, and the manifest, in the folder of an
``IndexPlace``. Written by data/prepare/build_index.py and index_files.py; read here.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vl3train.contracts.records import SampleError, SampleLengths
from vl3train.data.plan.cache import mark_used
from vl3train.data.plan.sample_table import (
    MAPPED_FROM_SAMPLES,
    SampleTable,
    columns,
    for_the_plan,
    is_whole,
    map_rows,
    rejected_of,
    rows_file,
    write_rows,
)
from vl3train.data.shards.manifest import (
    IndexPlace,
    MissingIndexError,
    check_rows,
    read_manifest,
    rows_path,
)
from vl3train.data.shards.read import read_parts
from vl3train.data.shards.remote import RangeCache
from vl3train.data.shards.several_records import member_of, split_records
from vl3train.data.shards.tar_headers import CAPTION_PART, CONVERSATION_PART, Part

USABLE = "ok"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("part_names", pa.list_(pa.string())),
        ("part_offsets", pa.list_(pa.int64())),
        ("part_sizes", pa.list_(pa.int64())),
        ("part_crc32s", pa.list_(pa.int64())),
        ("unread_parts", pa.list_(pa.string())),  # members that are neither text nor media; never opened
        ("remarks", pa.list_(pa.string())),  # what is odd or lost of its images (data/pictures/colours.py)
        ("num_tokens", pa.int64()),
        ("num_supervised_tokens", pa.int64()),
        ("num_visual_tokens", pa.int64()),
        ("num_patches", pa.int64()),
        ("num_patch_pairs", pa.int64()),  # sum over frames of their patches squared: the encoder's attention
        ("grids", pa.list_(pa.int32())),  # t, h, w of each visual item, flat
        ("merge_sizes", pa.list_(pa.int32())),
        ("kept_tokens", pa.list_(pa.int32())),
        ("modality", pa.string()),
        ("record", pa.int64()),  # its number in a member of several; 0 where there is one
        ("prefix_tokens", pa.int64()),
        ("family", pa.int64()),
        ("status", pa.string()),  # USABLE, or the reason why not
    ]
)


@dataclass(frozen=True)
class Index:
    """All usable samples of a recipe's sources, source after source. A sample's number here is its *row*."""

    source_names: tuple[str, ...]
    weights: tuple[float, ...]
    sizes: tuple[int, ...]  # usable samples of each source
    shards: tuple[Path, ...]
    rows: pa.Table  # SCHEMA and "shard", the number of the row's shard
    rejected: tuple[tuple[str, str], ...]
    """Key and reason of every sample of these sources that the index rejected."""
    ignored_members: tuple[tuple[str, str, int], ...]
    """Source, suffix and number of members that are neither text nor media; they are never opened."""
    remarks: tuple[tuple[str, str, int], ...]
    """Source, remark and number of samples whose images are read, but odd or not as they are meant."""
    fingerprint: str
    cache: RangeCache | None = None  # of remote shards
    file: Path | None = None
    """Where ``rows`` are mapped from. Another process gets this path in place of them."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ if self.file is None else {**self.__dict__, "rows": None, "rejected": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["file"] is not None:
            state["rows"] = map_rows(state["file"])
            state["rejected"] = rejected_of(state["rows"])
        self.__dict__.update(state)

    @property
    def num_samples(self) -> int:
        """Usable samples."""
        return int(self.rows.num_rows)

    def source(self, row: int) -> int:
        """Number of the row's source in the recipe."""
        return int(np.searchsorted(np.cumsum(self.sizes), row, "right"))

    def shard(self, row: int) -> Path:
        """The row's shard file."""
        return self.shards[self.rows["shard"][row].as_py()]

    def key(self, row: int) -> str:
        """source/shard/member."""
        return f"{self.source_names[self.source(row)]}/{self.shard(row).stem}/{self.rows['key'][row].as_py()}"

    def lengths(self, row: int) -> SampleLengths:
        """What the index pass measured."""
        values = self._row(row)
        grids = values["grids"]
        return SampleLengths(
            num_tokens=values["num_tokens"],
            num_supervised_tokens=values["num_supervised_tokens"],
            num_visual_tokens=values["num_visual_tokens"],
            num_patches=values["num_patches"],
            grids=tuple((grids[i], grids[i + 1], grids[i + 2]) for i in range(0, len(grids), 3)),
            merge_sizes=tuple(values["merge_sizes"]),
            kept_tokens=tuple(values["kept_tokens"]),
            modality=values["modality"],
            prefix_tokens=values["prefix_tokens"],
            family=values["family"],
        )

    def media(self, keys: Collection[str]) -> dict[str, list[str]]:
        """The images and clips of some samples, by ``key``: the paths of their shards, and the members there.

        ``["val/00000.tar/000000007.0.jpg"]`` for a sample with one image.
        """
        wanted, found = set(keys), {}
        for row in range(self.num_samples):
            if (key := self.key(row)) in wanted:
                values = self._row(row)
                member = self.shard(row) / member_of(values["key"], values["record"])
                names = (
                    name for name in values["part_names"] if name not in (CONVERSATION_PART, CAPTION_PART)
                )
                found[key] = [f"{member}.{name}" for name in names]
        return found

    def read_sample(self, row: int, *, retry_seconds: float = 0.0) -> tuple[bytes, dict[str, bytes]]:
        """The conversation's JSON (empty where a caption is all), and its other parts by name.

        ``retry_seconds``: as ``read_parts``.

        Raises:
            SampleError: the bytes are not those that were indexed.
        """
        return self._read(row, retry_seconds=retry_seconds, with_media=True)

    def read_text(self, row: int, *, retry_seconds: float = 0.0) -> tuple[bytes, dict[str, bytes]]:
        """As ``read_sample``, with no bytes for the media: for a record whose family shows them already."""
        return self._read(row, retry_seconds=retry_seconds, with_media=False)

    def _read(self, row: int, *, retry_seconds: float, with_media: bool) -> tuple[bytes, dict[str, bytes]]:
        values = self._row(row)
        fields = zip(values["part_names"], values["part_offsets"], values["part_sizes"], strict=True)
        crc32s = {Part(*one): crc32 for one, crc32 in zip(fields, values["part_crc32s"], strict=True)}
        parts = [part for part in crc32s if with_media or part.name in (CONVERSATION_PART, CAPTION_PART)]
        data = read_parts(self.shard(row), parts, self.cache, retry_seconds=retry_seconds)
        for part in parts:
            if zlib.crc32(data[part.name]) != crc32s[part]:
                raise SampleError(
                    f"part {part.name}: its bytes differ from those indexed (crc32): {self.shard(row)} was replaced or "
                    "damaged since. Restore it, or start again: the start says what changed"
                )
        data = {part.name: data.get(part.name, b"") for part in crc32s}
        records = split_records(data.pop(CONVERSATION_PART, b""))
        if values["record"] >= len(records):
            raise SampleError(
                f"the member holds {len(records)} records, and number {values['record']} was indexed"
            )
        return records[values["record"]], data

    def sample_table(self) -> SampleTable:
        """What the plan reads."""
        return SampleTable(
            sizes=self.sizes,
            weights=self.weights,
            fingerprint=self.fingerprint,
            file=self.file,
            **columns(self.rows),
        )

    def _row(self, row: int) -> dict[str, Any]:
        (values,) = self.rows.slice(row, 1).to_pylist()
        return dict(values)


def open_index(
    sources: Sequence[tuple[str, float, IndexPlace | None]],
    cache: RangeCache | None = None,
    folder: Path | None = None,
) -> Index:
    """The index of some sources, each a name, a weight and its shards (None: it has no samples).

    Args:
        sources: in the order of the recipe, all with the same settings.
        cache: keeps what is read of remote shards.
        folder: where the rows of a long index are kept for all processes of the node to map; None: each has them
            in its own memory.

    Raises:
        MissingIndexError: one of them is missing, stale or damaged; every one is in the message.
    """
    shards, sizes, contents, problems, files = [], [], [], [], []
    ignored: Counter[tuple[str, str]] = Counter()
    remarks: Counter[tuple[str, str]] = Counter()
    made_with = next((place.settings.fingerprint() for _, _, place in sources if place is not None), "")
    for name, _, place in sources:
        sizes.append(0)
        if place is None:
            continue
        try:
            manifest = read_manifest(place)
        except MissingIndexError as error:
            problems.append(str(error))
            continue
        for entry in manifest["shards"]:
            sizes[-1] += entry["samples"] - entry["rejected"]
            ignored.update({(name, suffix): count for suffix, count in entry["unread_parts"].items()})
            remarks.update({(name, remark): count for remark, count in entry["remarks"].items()})
            shards.append(place.shards / entry["name"])
            files.append((name, place.folder, entry))
            contents.append([name, entry["name"], entry["samples"], entry["rows_sha256"]])
    if problems:
        raise MissingIndexError("\n".join(problems))
    fingerprint = hashlib.sha256(json.dumps([made_with, contents]).encode()).hexdigest()[:16]
    file = rows_file(folder, fingerprint) if folder and sum(sizes) >= MAPPED_FROM_SAMPLES else None
    if file is None or not is_whole(file):
        rows, rejected = _read_rows(files)
        if file is not None:
            write_rows(file, rows, rejected)
    if file is not None:
        mark_used(file)
        rows = map_rows(file)
    return Index(
        source_names=tuple(name for name, _, _ in sources),
        weights=tuple(weight for _, weight, _ in sources),
        sizes=tuple(sizes),
        shards=tuple(shards),
        rows=rows,
        rejected=tuple(rejected) if file is None else rejected_of(rows),
        ignored_members=tuple((*which, count) for which, count in sorted(ignored.items())),
        remarks=tuple((*which, count) for which, count in sorted(remarks.items())),
        fingerprint=fingerprint,
        cache=cache,
        file=file,
    )


def _read_rows(
    files: Sequence[tuple[str, Path, dict[str, Any]]],
) -> tuple[pa.Table, list[tuple[str, str]]]:
    """The usable rows of some shards, each a source's name, a folder and an entry of its manifest; key and reason
    of the others.

    Raises:
        MissingIndexError: files are damaged; every one is in the message.
    """
    tables, rejected, problems = [], [], []
    for _, folder, entry in files:
        try:
            check_rows(folder, entry)
        except MissingIndexError as error:
            problems.append(str(error))
    if problems:
        raise MissingIndexError("\n".join(problems))
    for number, (name, folder, entry) in enumerate(files):
        table = pq.read_table(rows_path(folder, entry["name"]))
        usable = np.array([status == USABLE for status in table["status"].to_pylist()], bool)
        rejected_rows = table.filter(pa.array(~usable))
        stem = Path(entry["name"]).stem
        rejected += [
            (f"{name}/{stem}/{key}", reason)
            for key, reason in zip(
                rejected_rows["key"].to_pylist(), rejected_rows["status"].to_pylist(), strict=True
            )
        ]
        usable_rows = table.filter(pa.array(usable))
        shard = pa.array(np.full(usable_rows.num_rows, number, np.int32))
        tables.append(usable_rows.append_column("shard", shard).replace_schema_metadata(None))
    empty = SCHEMA.append(pa.field("shard", pa.int32())).empty_table()
    return for_the_plan(pa.concat_tables(tables) if tables else empty).combine_chunks(), rejected
