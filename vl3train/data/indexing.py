"""The index pass: every sample is read, decoded and measured once. Restartable; several shards at a time.

A clip's length in tokens depends on its pixels (frame pruning), so there is no way around decoding it here.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from vl3train.contracts.records import BadSample, RenderSettings, SampleLengths
from vl3train.data.index import (
    MANIFEST,
    SCHEMA,
    USABLE,
    NoIndex,
    index_folder,
    read_manifest,
    read_parts,
    shard_files,
)
from vl3train.data.media import DecodeLimits
from vl3train.data.members import CONVERSATION_PART, BadShard, ShardSample, shard_samples
from vl3train.data.processes import clean_processes
from vl3train.data.samples import measure_sample
from vl3train.data.tokens import ChatTokenizer

CHUNK_SAMPLES = 32
"""Samples a process measures at a time: small enough for a live progress bar and even work."""
FACTS = b"vl3train"
"""Key of what a parquet file was made from, in its own metadata."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    shard: Path
    samples: tuple[ShardSample, ...]
    settings: RenderSettings
    tokenizer_dir: Path
    limits: DecodeLimits


def build_index(
    shards: Path,
    settings: RenderSettings,
    *,
    tokenizer_dir: Path,
    limits: DecodeLimits,
    num_workers: int,
    progress: Callable[[int, int], None],
) -> Path:
    """Index a folder of shards and return the index folder; what is there and still fits is kept.

    Args:
        num_workers: processes that decode; 0 decodes in this one.
        progress: called with samples done and samples in all.

    Raises:
        BadShard: some shards are damaged in their structure; all of them are in the message.
    """
    folder = index_folder(shards, settings)
    try:
        read_manifest(shards, settings, limits)
    except NoIndex:
        pass
    else:
        if all(_is_current(folder, shard, limits) for shard in shard_files(shards)):
            return folder
    folder.mkdir(exist_ok=True)
    todo = [shard for shard in shard_files(shards) if not _is_current(folder, shard, limits)]
    samples = _walk(todo)
    total, done = sum(map(len, samples.values())), 0
    chunks = [
        _Chunk(shard, tuple(members[first : first + CHUNK_SAMPLES]), settings, tokenizer_dir, limits)
        for shard, members in samples.items()
        for first in range(0, len(members), CHUNK_SAMPLES)
    ]
    rows: dict[Path, list[dict[str, Any]]] = {shard: [] for shard in todo}
    for shard in [shard for shard in todo if not samples[shard]]:
        _write_rows(folder, shard, [], limits)
    for chunk, measured in zip(chunks, _measured(chunks, num_workers), strict=True):
        rows[chunk.shard] += measured
        done += len(measured)
        progress(done, total)
        if len(rows[chunk.shard]) == len(samples[chunk.shard]):
            _write_rows(folder, chunk.shard, rows.pop(chunk.shard), limits)
    _write_manifest(folder, shard_files(shards), settings, limits)
    return folder


def _walk(shards: Sequence[Path]) -> dict[Path, list[ShardSample]]:
    found, faults = {}, []
    for shard in shards:
        try:
            found[shard] = shard_samples(shard)
        except BadShard as error:
            faults.append(str(error))
    if faults:
        raise BadShard("\n".join([*faults, "make these shards again, or take them out of the folder"]))
    return found


def _measured(chunks: Sequence[_Chunk], num_workers: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of every chunk, in order."""
    if num_workers == 0 or len(chunks) < 2:
        yield from map(_measure_chunk, chunks)
        return
    with ProcessPoolExecutor(
        min(num_workers, len(chunks)),
        mp_context=clean_processes(),
        initializer=torch.set_num_threads,  # as DataLoader does: a core for each process, not for each thread
        initargs=(1,),
    ) as pool:
        done = 0
        try:
            for measured in pool.map(_measure_chunk, chunks):
                done += 1
                yield measured
        except BrokenProcessPool as error:
            near = chunks[done]
            raise RuntimeError(
                f"a decoding process died near {near.shard}, keys {near.samples[0].key} to "
                f"{near.samples[-1].key}, out of memory or on a sample that crashes the decoder; "
                "what was indexed is kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> ChatTokenizer:
    return ChatTokenizer.from_folder(folder)


def _measure_chunk(chunk: _Chunk) -> list[dict[str, Any]]:
    tokenizer = _tokenizer(chunk.tokenizer_dir)
    return [
        _measure(chunk.shard, sample, chunk.settings, tokenizer, chunk.limits) for sample in chunk.samples
    ]


def _measure(
    shard: Path, sample: ShardSample, settings: RenderSettings, tokenizer: ChatTokenizer, limits: DecodeLimits
) -> dict[str, Any]:
    """The row of one sample, whatever becomes of it."""
    row: dict[str, Any] = {"key": sample.key, "status": USABLE}
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
        data = read_parts(shard, sample.parts)
        row["part_crc32s"] = [zlib.crc32(data[part.name]) for part in sample.parts]
        if fault := sample.fault():
            raise BadSample(fault)
        conversation = data.pop(CONVERSATION_PART)
        lengths = measure_sample(conversation, data, settings, tokenizer, limits)
    except BadSample as error:
        row["status"] = str(error)
    except Exception as error:
        error.add_note(f"while indexing {shard}, key {sample.key}")
        raise
    return {
        "part_crc32s": [],
        **row,
        "part_names": [part.name for part in sample.parts],
        "part_offsets": [part.offset for part in sample.parts],
        "part_sizes": [part.size for part in sample.parts],
        **dataclasses.asdict(lengths),
        "num_patch_pairs": sum(t * (h * w) ** 2 for t, h, w in lengths.grids),
        "grids": [int(size) for grid in lengths.grids for size in grid],
    }


def _facts(shard: Path, limits: DecodeLimits) -> dict[str, Any]:
    stat = shard.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "limits": dataclasses.asdict(limits)}


def _is_current(folder: Path, shard: Path, limits: DecodeLimits) -> bool:
    path = folder / f"{shard.name}.parquet"
    if not path.is_file():
        return False
    return bool(json.loads(pq.read_schema(path).metadata[FACTS]) == _facts(shard, limits))


def _write_rows(folder: Path, shard: Path, rows: list[dict[str, Any]], limits: DecodeLimits) -> None:
    table = pa.Table.from_pylist(rows, SCHEMA)
    facts = {FACTS: json.dumps(_facts(shard, limits)).encode()}
    path = folder / f"{shard.name}.parquet"
    pq.write_table(table.replace_schema_metadata(facts), path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


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
                "bytes": shard.stat().st_size,
                "samples": table.num_rows,
                "refused": sum(status != USABLE for status in table["status"].to_pylist()),
                "rows_sha256": hashlib.sha256(json.dumps(table.to_pydict()).encode()).hexdigest(),
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
    temporary = folder / f"{MANIFEST}.tmp"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, folder / MANIFEST)
