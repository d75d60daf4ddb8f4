"""The index pass: every sample is read, decoded and measured once. Restartable; several shards at a time.

A clip's length in tokens depends on its pixels (frame pruning), so there is no way around decoding it here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
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

_Begun = tuple[int, Future[list[dict[str, Any]]]]
"""Some samples of a shard: how many, and their rows."""


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
    if not sources:
        return []
    problems: dict[int, str] = {}
    changed: list[str] = []
    begun: deque[tuple[int, Generator[None, None, None]]] = deque()

    def go_on(number: int, source: Generator[None, None, None]) -> bool:
        """Whether it waits for its samples, and is not at its end."""
        try:
            return next(source, source) is not source
        except MissingIndexError as error:
            problems[number] = str(error)
            return False

    with contextlib.ExitStack() as stack:
        _, first = sources[0]
        server = decode_server(first.settings, tokenizer_dir, first.limits)
        measuring = stack.enter_context(
            contextlib.closing(_Measuring(server, decode_seconds, decode, max(1, num_workers)))
        )
        for number, (name, place) in enumerate(sources):
            # Small sources are measured side by side, but for two of the same shards.
            while begun and (
                measuring.is_busy or any(sources[one][1].folder == place.folder for one, _ in begun)
            ):
                go_on(*begun.popleft())
            told = functools.partial(progress, name)
            source = _index_source(name, place, measuring, changed, told)
            if go_on(number, stack.enter_context(contextlib.closing(source))):
                begun.append((number, source))
        while begun:
            go_on(*begun.popleft())
    if problems:
        raise MissingIndexError("\n".join(problems[number] for number in sorted(problems)))
    return changed


def _index_source(
    name: str,
    place: IndexPlace,
    measuring: _Measuring,
    changed: list[str],
    progress: Callable[[int, int], None],
) -> Generator[None, None, None]:
    """Index one source. Yields once, if there is something to measure, when its local shards have been begun."""
    todo = _shards_to_do(place, measuring.decode, changed)
    if todo is None:
        return
    yield from _index_shards(place, todo, measuring, progress)
    with _writing(place):
        before, now = write_manifest(place, shard_files(place.shards))
    if before is not None:
        changed += manifest_changes(name, before, now)


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
    measuring: _Measuring,
    progress: Callable[[int, int], None],
) -> Generator[None, None, None]:
    """Measure some shards and write their rows. Yields when the local ones have been begun.

    Raises:
        MissingIndexError: some cannot be read; the others are written.
    """
    # Remote shards one after the other: each is fetched whole, as every sample of it is read.
    local = [shard for shard in todo if address_of(shard) is None]
    groups = [local, *([shard] for shard in todo if shard not in local)]
    done = total = 0
    problems = []
    for group in groups:
        with contextlib.ExitStack() as stack:
            try:
                files = stack.enter_context(local_files(group, place.folder))
            except RemoteError as error:
                problems.append(f"{error}; correct {SHARD_LIST}, or run the command again")
                continue
            begun: dict[Path, deque[_Begun]] = {}
            for shard, file in files.items():
                try:
                    samples = shard_samples(file)
                except OSError as error:
                    problems.append(
                        f"{shard} cannot be read: {error.strerror}; make it readable, or remove it"
                    )
                    continue
                total += len(samples)
                parts = [samples[at : at + CHUNK_SAMPLES] for at in range(0, len(samples), CHUNK_SAMPLES)]
                begun[shard] = deque((len(part), measuring.begin(file, part)) for part in parts)
            if group is local:
                yield
            while begun:
                shard = next(iter(begun))
                measured, rows = begun.pop(shard), list[dict[str, Any]]()
                while measured:  # what is written need not be held
                    num_samples, found = measured.popleft()
                    rows += found.result()
                    done += num_samples
                    progress(done, total)
                with _writing(place):
                    write_rows(place, shard, rows, measuring.decode)
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


class _Measuring:
    """Threads that measure samples for all sources. Each reads, and waits for a decode process of its own.
    ``server`` is started before the first sample."""

    def __init__(
        self, server: AbstractContextManager[str], seconds: float, decode: bool, num_threads: int
    ) -> None:
        self.decode = decode
        self._server, self._seconds, self._most = server, seconds, num_threads
        self._address: str | None = None
        self._stack = contextlib.ExitStack()
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="index")
        self._own = threading.local()
        self._unfinished: set[Future[list[dict[str, Any]]]] = set()

    def begin(self, shard: Path, samples: Sequence[ShardSample]) -> Future[list[dict[str, Any]]]:
        """Have some samples of a shard's file measured, after those of earlier calls; their rows, in order."""
        if self._address is None:
            self._address = self._stack.enter_context(self._server)
        future = self._pool.submit(self._rows, self._address, shard, samples)
        self._unfinished.add(future)
        future.add_done_callback(self._unfinished.discard)
        return future

    @property
    def is_busy(self) -> bool:
        """Whether every thread has enough to do until its caller comes again."""
        return len(self._unfinished) >= 4 * self._most

    def close(self) -> None:
        """Begin nothing more. Threads at work end with the decode server."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._stack.close()

    def _rows(self, address: str, shard: Path, samples: Sequence[ShardSample]) -> list[dict[str, Any]]:
        if not hasattr(self._own, "decoder"):
            self._own.decoder = Decoder(address, self._seconds)
        return [row for sample in samples for row in _measure(shard, sample, self._own.decoder, self.decode)]


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
