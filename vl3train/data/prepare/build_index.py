"""The index pass: every sample is read, decoded and measured once. Restartable; several shards at a time.

A clip's length in tokens depends on its pixels (frame pruning), so there is no way around decoding it here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl3train.contracts.records import SampleError, SampleLengths
from vl3train.data.prepare.index_files import is_current, write_manifest, write_rows
from vl3train.data.render.decode_client import Decoder, decode_server
from vl3train.data.shards.contents import manifest_changes
from vl3train.data.shards.index import USABLE
from vl3train.data.shards.manifest import IndexPlace, MissingIndexError, read_manifest, shard_files
from vl3train.data.shards.read import read_parts
from vl3train.data.shards.remote import SHARD_LIST, RemoteError, address_of, local_files
from vl3train.data.shards.several_records import record_key, split_records
from vl3train.data.shards.tar_headers import CAPTION_PART, CONVERSATION_PART, ShardSample, shard_samples

CHUNK_SAMPLES = 32
"""Samples that are measured at a time: small enough for a live progress bar and even work."""
MAX_MEDIUM_BYTES = 2_000_000_000
MAX_TEXT_BYTES = 4_000_000
"""Samples with larger files are rejected before they are read. Such a text would be 60 times the longest pack."""


NOTHING = SampleLengths(
    num_tokens=0,
    num_supervised_tokens=0,
    num_visual_tokens=0,
    num_patches=0,
    grids=(),
    merge_sizes=(),
    kept_tokens=(),
    modality="",
)
"""Lengths of a rejected sample."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    shard: Path
    samples: tuple[ShardSample, ...]


def build_indexes(
    sources: Sequence[tuple[str, IndexPlace]],
    *,
    tokenizer_dir: Path,
    num_workers: int,
    decode_seconds: float,
    progress: Callable[[str, int, int], None],
    decode: bool = False,
) -> list[str]:
    """Index folders of shards; what is there, whole and still fits is kept.

    Returns in words what was damaged and is made anew, and what changed in shards that were indexed before.

    Args:
        sources: name and shards of each, all with the same settings and limits.
        tokenizer_dir: the tokenizer that the settings name.
        num_workers: processes that decode; 0 is 1: nothing is decoded in this one.
        decode_seconds: wall-clock limit of one sample.
        progress: called with the source's name, samples done and samples in all.
        decode: decode every image and clip whole; an index made without is made anew.

    Raises:
        MissingIndexError: shards cannot be read, or an index cannot be written; every source with a problem is in the
            message, and the others are indexed.
    """
    problems: list[str] = []
    changed: list[str] = []
    with contextlib.ExitStack() as stack:
        decoding: _Decoding | None = None
        for name, place in sources:
            try:
                todo = _shards_to_do(place, decode, changed)
                if todo and decoding is None:  # one server for all: it takes two seconds to start
                    server = decode_server(place.settings, tokenizer_dir, place.limits)
                    decoding = _Decoding(stack.enter_context(server), decode_seconds, decode)
                if todo is not None:
                    _index_shards(
                        place, todo, max(1, num_workers), decoding, lambda *n, name=name: progress(name, *n)
                    )
                    with _writing(place):
                        before, now = write_manifest(place, shard_files(place.shards))
                    if before is not None:
                        changed += manifest_changes(name, before, now)
            except MissingIndexError as error:
                problems.append(str(error))
    if problems:
        raise MissingIndexError("\n".join(problems))
    return changed


def _shards_to_do(place: IndexPlace, decode: bool, damaged: list[str]) -> list[Path] | None:
    """Shards that have no rows that fit; None where the whole index is there. ``damaged`` gets a line for each one."""
    shards = shard_files(place.shards)
    todo = [shard for shard in shards if not is_current(place, shard, decode, damaged)]
    if not todo:
        try:
            read_manifest(place)
            return None
        except MissingIndexError:
            pass
    with _writing(place):
        place.folder.mkdir(parents=True, exist_ok=True)
    return todo


def _index_shards(
    place: IndexPlace,
    todo: Sequence[Path],
    num_threads: int,
    decoding: _Decoding | None,
    progress: Callable[[int, int], None],
) -> None:
    """Measure some shards and write their rows.

    Raises:
        MissingIndexError: some cannot be read; the others are written.
    """
    # Remote shards one after the other: each is fetched whole, as every sample of it is read.
    local = [shard for shard in todo if address_of(shard) is None]
    groups = [*([local] if local else []), *([shard] for shard in todo if shard not in local)]
    done = total = 0
    problems = []
    for group in groups:
        with contextlib.ExitStack() as stack:
            try:
                files = stack.enter_context(local_files(group, place.folder))
            except RemoteError as error:
                problems.append(f"{error}; correct {SHARD_LIST}, or run the command again")
                continue
            samples = {}
            for shard, file in files.items():
                try:
                    samples[shard] = shard_samples(file)
                except OSError as error:
                    problems.append(
                        f"{shard} cannot be read: {error.strerror}; make it readable, or remove it"
                    )
            total += sum(map(len, samples.values()))
            assert decoding is not None, "made where there is a shard"
            # Closed where the body fails, too: its threads would otherwise go on for as long as the error is kept.
            measured = stack.enter_context(
                contextlib.closing(_group_rows(samples, files, num_threads, decoding))
            )
            for rows in measured:
                done += rows.num_samples
                progress(done, total)
                if rows.complete is not None:
                    with _writing(place):
                        write_rows(place, rows.shard, rows.complete, decoding.decode)
    if problems:
        raise MissingIndexError("\n".join(problems))


@contextlib.contextmanager
def _writing(place: IndexPlace) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MissingIndexError(
            f"{place.shards}: its index cannot be written to {place.folder}: {error.strerror}; to keep it elsewhere, "
            "name a folder with data.index_dir=FOLDER, for this command and for training"
        ) from error


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
    num_samples: int  # members measured, of one record or several
    complete: list[dict[str, Any]] | None


def _group_rows(
    samples: dict[Path, list[ShardSample]],
    files: dict[Path, Path],
    num_threads: int,
    decoding: _Decoding,
) -> Generator[_Rows, None, None]:
    for shard in [shard for shard, members in samples.items() if not members]:
        yield _Rows(shard, [], 0, [])
    chunks = [
        (shard, _Chunk(files[shard], tuple(members[first : first + CHUNK_SAMPLES])))
        for shard, members in samples.items()
        for first in range(0, len(members), CHUNK_SAMPLES)
    ]
    collected: dict[Path, list[dict[str, Any]]] = {shard: [] for shard in samples}
    left = {shard: len(members) for shard, members in samples.items()}
    if chunks:
        with contextlib.closing(
            _measured([chunk for _, chunk in chunks], min(num_threads, len(chunks)), decoding)
        ) as measured:
            for (shard, chunk), rows in zip(chunks, measured, strict=True):
                collected[shard] += rows
                left[shard] -= len(chunk.samples)
                yield _Rows(shard, rows, len(chunk.samples), None if left[shard] else collected.pop(shard))


def _measured(
    chunks: Sequence[_Chunk], num_threads: int, decoding: _Decoding
) -> Generator[list[dict[str, Any]], None, None]:
    """The rows of every chunk, in order. A thread reads, and waits for a decode process of its own."""
    own = threading.local()

    def measure(chunk: _Chunk) -> list[dict[str, Any]]:
        if not hasattr(own, "decoder"):
            own.decoder = Decoder(decoding.address, decoding.seconds)
        return [
            row
            for sample in chunk.samples
            for row in _measure(chunk.shard, sample, own.decoder, decoding.decode)
        ]

    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="index")
    try:
        yield from pool.map(measure, chunks)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # those at work end with the decode server


def _measure(shard: Path, sample: ShardSample, decoder: Decoder, decode: bool) -> list[dict[str, Any]]:
    """The row of each record of one sample, rejected ones included."""
    crc32s: list[int] = []
    found: Sequence[tuple[SampleLengths, list[str]] | SampleError]
    try:
        if sample.rejection is not None:
            raise SampleError(sample.rejection)
        for part in sample.parts:
            is_text = part.name in (CONVERSATION_PART, CAPTION_PART)
            limit = MAX_TEXT_BYTES if is_text else MAX_MEDIUM_BYTES
            if part.size > limit:
                raise SampleError(f"member .{part.name} of {part.size} bytes is over the limit of {limit}")
        data = read_parts(shard, sample.parts)
        crc32s = [zlib.crc32(data[part.name]) for part in sample.parts]
        records = split_records(data.pop(CONVERSATION_PART, b""))
        found = decoder.measure_records(records, data, decode=decode)
    except SampleError as error:
        found = [error]
    except Exception as error:
        error.add_note(f"while indexing {shard}, key {sample.key}")
        raise
    return [
        {
            "key": sample.key if len(found) == 1 else record_key(sample.key, number),
            "record": number,
            "part_crc32s": crc32s,
            "unread_parts": [] if number else list(sample.ignored),  # of the member, so counted once
            "part_names": [part.name for part in sample.parts],
            "part_offsets": [part.offset for part in sample.parts],
            "part_sizes": [part.size for part in sample.parts],
            **_row(one),
        }
        for number, one in enumerate(found)
    ]


def _row(found: tuple[SampleLengths, list[str]] | SampleError) -> dict[str, Any]:
    lengths, remarks = (NOTHING, []) if isinstance(found, SampleError) else found
    return {
        "status": str(found) if isinstance(found, SampleError) else USABLE,
        "remarks": sorted(remarks),
        **dataclasses.asdict(lengths),
        "num_patch_pairs": sum(t * (h * w) ** 2 for t, h, w in lengths.grids),
        "grids": [int(size) for grid in lengths.grids for size in grid],
    }
