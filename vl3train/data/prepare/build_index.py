"""The index pass: every sample is read, decoded and measured once. Restartable; several shards at a time.

A clip's length in tokens depends on its pixels (frame pruning), so there is no way around decoding it here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vl3train.contracts.files import whole_file, write_whole
from vl3train.contracts.records import RenderSettings, SampleError, SampleLengths
from vl3train.data.media.clips import DecodeLimits
from vl3train.data.render.decode_client import Decoder, decode_server
from vl3train.data.shards.addresses import shown_address
from vl3train.data.shards.index import SCHEMA, USABLE
from vl3train.data.shards.manifest import (
    MANIFEST,
    MissingIndexError,
    index_folder,
    read_manifest,
    shard_files,
)
from vl3train.data.shards.read import read_parts
from vl3train.data.shards.remote import address_of, local_files
from vl3train.data.shards.tar_headers import CAPTION_PART, CONVERSATION_PART, ShardSample, shard_samples

CHUNK_SAMPLES = 32
"""Samples that are measured at a time: small enough for a live progress bar and even work."""
MAX_MEDIUM_BYTES = 2_000_000_000
MAX_TEXT_BYTES = 4_000_000
"""Samples with larger files are rejected before they are read. Such a text would be 60 times the longest pack."""
FACTS = b"vl3train"
"""Key of what a parquet file was made from, in its own metadata."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    shard: Path
    samples: tuple[ShardSample, ...]


def build_index(
    shards: Path,
    settings: RenderSettings,
    *,
    tokenizer_dir: Path,
    limits: DecodeLimits,
    num_workers: int,
    decode_seconds: float,
    progress: Callable[[int, int], None],
    decode: bool = False,
) -> Path:
    """Index a folder of shards and return the index folder; what is there and still fits is kept.

    Args:
        num_workers: processes that decode; 0 is 1: nothing is decoded in this one.
        decode_seconds: wall-clock limit of one sample.
        progress: called with samples done and samples in all.
        decode: decode every image and clip whole; an index made without is made anew.
    """
    folder = index_folder(shards, settings)
    try:
        read_manifest(shards, settings, limits)
    except MissingIndexError:
        pass
    else:
        if all(_is_current(folder, shard, limits, decode) for shard in shard_files(shards)):
            return folder
    folder.mkdir(exist_ok=True)
    todo = [shard for shard in shard_files(shards) if not _is_current(folder, shard, limits, decode)]
    # Remote shards one after the other: each is fetched whole, as every sample of it is read.
    groups = [
        [shard for shard in todo if shard.is_file()],
        *([shard] for shard in todo if not shard.is_file()),
    ]
    done = total = 0
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(decode_server(settings, tokenizer_dir, limits)) if todo else ""
        for group in groups:
            with local_files(group, folder) as files:
                samples = {shard: shard_samples(file) for shard, file in files.items()}
                total += sum(map(len, samples.values()))
                decoding = _Decoding(address, decode_seconds, decode)
                for rows in _group_rows(samples, files, max(1, num_workers), decoding):
                    done += len(rows.rows)
                    progress(done, total)
                    if rows.complete is not None:
                        _write_rows(folder, rows.shard, rows.complete, limits, decode)
    _write_manifest(folder, shard_files(shards), settings, limits)
    return folder


@dataclass(frozen=True, slots=True)
class _Decoding:
    """How samples are decoded: the decode server's address, a sample's time limit, whether all is decoded."""

    address: str
    seconds: float
    decode: bool


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows just measured; ``complete`` are all of the shard once it is done."""

    shard: Path
    rows: list[dict[str, Any]]
    complete: list[dict[str, Any]] | None


def _group_rows(
    samples: dict[Path, list[ShardSample]],
    files: dict[Path, Path],
    num_threads: int,
    decoding: _Decoding,
) -> Iterator[_Rows]:
    for shard in [shard for shard, members in samples.items() if not members]:
        yield _Rows(shard, [], [])
    chunks = [
        (shard, _Chunk(files[shard], tuple(members[first : first + CHUNK_SAMPLES])))
        for shard, members in samples.items()
        for first in range(0, len(members), CHUNK_SAMPLES)
    ]
    collected: dict[Path, list[dict[str, Any]]] = {shard: [] for shard in samples}
    if chunks:
        measured = _measured([chunk for _, chunk in chunks], min(num_threads, len(chunks)), decoding)
        for (shard, _), rows in zip(chunks, measured, strict=True):
            collected[shard] += rows
            whole = len(collected[shard]) == len(samples[shard])
            yield _Rows(shard, rows, collected.pop(shard) if whole else None)


def _measured(
    chunks: Sequence[_Chunk], num_threads: int, decoding: _Decoding
) -> Iterator[list[dict[str, Any]]]:
    """The rows of every chunk, in order. A thread reads, and waits for a decode process of its own."""
    own = threading.local()

    def measure(chunk: _Chunk) -> list[dict[str, Any]]:
        if not hasattr(own, "decoder"):
            own.decoder = Decoder(decoding.address, decoding.seconds)
        return [_measure(chunk.shard, sample, own.decoder, decoding.decode) for sample in chunk.samples]

    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="index")
    try:
        yield from pool.map(measure, chunks)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # those at work end with the decode server


def _measure(shard: Path, sample: ShardSample, decoder: Decoder, decode: bool) -> dict[str, Any]:
    """The row of one sample, rejected ones included."""
    row: dict[str, Any] = {"key": sample.key, "status": USABLE}
    remarks: set[str] = set()
    lengths = SampleLengths(
        num_tokens=0,
        num_supervised_tokens=0,
        num_visual_tokens=0,
        num_patches=0,
        grids=(),
        merge_sizes=(),
        kept_tokens=(),
        modality="",
    )
    try:
        if sample.rejection is not None:
            raise SampleError(sample.rejection)
        for part in sample.parts:
            is_text = part.name in (CONVERSATION_PART, CAPTION_PART)
            limit = MAX_TEXT_BYTES if is_text else MAX_MEDIUM_BYTES
            if part.size > limit:
                raise SampleError(f"member .{part.name} of {part.size} bytes is over the limit of {limit}")
        data = read_parts(shard, sample.parts)
        row["part_crc32s"] = [zlib.crc32(data[part.name]) for part in sample.parts]
        lengths = decoder.measure(data.pop(CONVERSATION_PART, b""), data, decode=decode, remarks=remarks)
    except SampleError as error:
        row["status"] = str(error)
    except Exception as error:
        error.add_note(f"while indexing {shard}, key {sample.key}")
        raise
    return {
        "part_crc32s": [],
        **row,
        "unread_parts": list(sample.ignored),
        "remarks": sorted(remarks),
        "part_names": [part.name for part in sample.parts],
        "part_offsets": [part.offset for part in sample.parts],
        "part_sizes": [part.size for part in sample.parts],
        **dataclasses.asdict(lengths),
        "num_patch_pairs": sum(t * (h * w) ** 2 for t, h, w in lengths.grids),
        "grids": [int(size) for grid in lengths.grids for size in grid],
    }


def _facts(shard: Path, limits: DecodeLimits) -> dict[str, Any]:
    """What decides whether rows are still those of the shard.

    Of a remote shard the address, without its signature: requests for all sizes would take minutes. A shard that was
    replaced under the same address is found by crc32 when its samples are read.
    """
    address = address_of(shard)
    if address is not None:
        return {"address": shown_address(address), "limits": dataclasses.asdict(limits)}
    stat = shard.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "limits": dataclasses.asdict(limits)}


def _is_current(folder: Path, shard: Path, limits: DecodeLimits, decode: bool) -> bool:
    path = folder / f"{shard.name}.parquet"
    if not path.is_file():
        return False
    facts = json.loads(pq.read_schema(path).metadata[FACTS])
    decoded = facts.pop("decoded", False)
    return bool(facts == _facts(shard, limits)) and (decoded or not decode)


def _write_rows(
    folder: Path, shard: Path, rows: list[dict[str, Any]], limits: DecodeLimits, decode: bool
) -> None:
    table = pa.Table.from_pylist(rows, SCHEMA)
    facts = {FACTS: json.dumps({**_facts(shard, limits), "decoded": decode}).encode()}
    with whole_file(folder / f"{shard.name}.parquet") as partial:
        pq.write_table(table.replace_schema_metadata(facts), partial)


def _write_manifest(
    folder: Path, shards: Sequence[Path], settings: RenderSettings, limits: DecodeLimits
) -> None:
    """Written last: its presence says that the index is complete."""
    entries = []
    for shard in shards:
        table = pq.read_table(folder / f"{shard.name}.parquet")
        entries.append(
            {
                "name": shard.name,
                "bytes": shard.stat().st_size if shard.is_file() else None,
                "samples": table.num_rows,
                "refused": sum(status != USABLE for status in table["status"].to_pylist()),
                "unread_parts": Counter(
                    name.rpartition(".")[2] for names in table["unread_parts"].to_pylist() for name in names
                ),
                "remarks": Counter(remark for remarks in table["remarks"].to_pylist() for remark in remarks),
                # Without remarks: those of decoded samples are more exact, and the samples are the same.
                "rows_sha256": hashlib.sha256(
                    json.dumps(table.drop_columns(["remarks"]).to_pydict()).encode()
                ).hexdigest(),
            }
        )
    text = json.dumps(
        {
            "settings": dataclasses.asdict(settings),
            "limits": dataclasses.asdict(limits),
            "shards": entries,
        },
        indent=1,
    )
    write_whole(folder / MANIFEST, text)
