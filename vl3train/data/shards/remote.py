"""Shards in an object store or behind HTTP: read by ranges, with retries, kept in a bounded local cache.

A folder of shards may hold ``shards.txt``, one address a line, ``s3://bucket/a-000.tar``, ``https://...``: whatever
fsspec opens (``pip install s3fs``, ``gcsfs``, ``aiohttp``) of ``addresses.SCHEMES``. Their index lies in that folder.
Indexing fetches each shard whole, once; training reads each sample with one ranged request. An address that is signed,
or has a password, is used for requests only (addresses.py).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import queue
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl3train.contracts.files import whole_file
from vl3train.contracts.redaction import shown_address, without_secrets
from vl3train.data.shards.addresses import address_problem, shard_name

SHARD_LIST = "shards.txt"
ATTEMPTS, FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 7, 0.25, 20.0
"""Waits double, and each reader draws its own: many that failed together shall not retry together."""
TRY_SECONDS, SLOWEST_BYTES_A_SECOND = 30.0, 1_000_000
"""Time limit of one try, and the rate by which it grows with the size of the range: a stalled connection reports no
error, and fsspec's own limit for HTTP is five minutes."""
FETCH_BYTES = 16 * 2**20
MESSAGE_CHARACTERS = 400
"""Of a library's error; some hold the whole answer of the server."""
PERMANENT_ERRORS = (FileNotFoundError, PermissionError, NotImplementedError, ImportError)
"""Errors that a retry does not solve."""


class RemoteError(OSError):
    """A range that could not be read, with the last error."""


def listed_shards(folder: Path) -> dict[str, str]:
    """Addresses of the remote shards of a folder by their file names; empty without a list."""
    path = folder / SHARD_LIST
    return dict(_listed(path, path.stat().st_mtime_ns)) if path.is_file() else {}


@functools.lru_cache(maxsize=256)
def _listed(path: Path, mtime_ns: int) -> tuple[tuple[str, str], ...]:
    lines = path.read_text(encoding="utf-8").splitlines()
    found: dict[str, str] = {}
    problems = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        name, problem = shard_name(line), address_problem(line)
        if problem is None and name in found:
            problem = f"a shard named {name} is there already; put them into different folders"
        if problem is None:
            found[name] = line
        else:
            problems.append(f"{path}, line {number}: {problem}")
    if problems:
        raise ValueError("\n".join(problems))
    return tuple(found.items())


def address_of(shard: Path) -> str | None:
    """Where a shard lies if not on this machine."""
    return None if shard.is_file() else listed_shards(shard.parent).get(shard.name)


@dataclass(frozen=True)
class RangeCache:
    """Ranges that were read, as files of a folder; the ones used longest ago go first."""

    folder: Path
    max_bytes: int

    def get(self, name: str) -> bytes | None:
        """What was put under this name, if it is still there."""
        path = self.folder / name
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:  # another process may have removed it meanwhile
            return None
        return data

    def put(self, name: str, data: bytes) -> None:
        """Keep ``data``, and delete the oldest ranges over ``max_bytes``. Other processes may do so as well."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self.folder / name, durable=False) as partial:
            partial.write_bytes(data)
        # Listing the folder costs time: the more of the cache was written, the more often it is done.
        if random.random() < max(0.01, 16 * len(data) / self.max_bytes):
            self._shrink()

    def _shrink(self) -> None:
        entries = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                stat = entry.stat()
                entries.append((stat.st_mtime_ns, stat.st_size, entry.path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.max_bytes * 7 // 8:
                break
            Path(path).unlink(missing_ok=True)
            total -= size


def read_range(url: str, offset: int, size: int, cache: RangeCache | None = None) -> bytes:
    """``size`` bytes from ``offset``.

    Raises:
        RemoteError: after the last try; or the file ends before.
    """
    shown = shown_address(url)  # so that a new signature finds what the former one kept
    name = hashlib.sha256(f"{shown} {offset} {size}".encode()).hexdigest()
    if cache is not None and (kept := cache.get(name)) is not None and len(kept) == size:
        return kept

    def read() -> bytes:
        system, path = _opened(url)
        if not size:
            return b""
        seconds = TRY_SECONDS + size / SLOWEST_BYTES_A_SECOND
        data: bytes = _within(seconds, system, "cat_file", path, start=offset, end=offset + size)
        if len(data) != size:
            raise OSError(f"{len(data)} bytes came, {size} were asked for")
        return data

    data = _tried(read, url, f"{shown} bytes {offset} to {offset + size}")
    if cache is not None:
        cache.put(name, data)
    return data


def remote_size(url: str) -> int:
    """Bytes of a file.

    Raises:
        RemoteError: after the last try.
    """

    def read() -> int:
        system, path = _opened(url)
        return int(_within(TRY_SECONDS, system, "size", path))

    return int(_tried(read, url, shown_address(url)))


@contextlib.contextmanager
def fetched(url: str, folder: Path) -> Iterator[Path]:
    """A whole remote file as a local one in ``folder``, deleted when the block ends.

    Raises:
        RemoteError: after the last try of a range.
    """
    total = remote_size(url)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="fetched-") as file:
        for offset in range(0, total, FETCH_BYTES):
            file.write(read_range(url, offset, min(FETCH_BYTES, total - offset)))
        file.flush()
        yield Path(file.name)


@contextlib.contextmanager
def local_files(shards: Sequence[Path], folder: Path) -> Iterator[dict[Path, Path]]:
    """The file of each shard; of a remote one a copy in ``folder`` that exists as long as the ``with`` block.

    Raises:
        RemoteError: one of them cannot be fetched.
    """
    with contextlib.ExitStack() as stack:
        files = {}
        for shard in shards:
            address = address_of(shard)
            files[shard] = shard if address is None else stack.enter_context(fetched(address, folder))
        yield files


def _opened(url: str) -> tuple[Any, str]:
    import fsspec

    system, path = fsspec.core.url_to_fs(url)  # fsspec keeps one file system for each process
    return system, path


def _within(seconds: float, system: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """A method of a file system, ended after so many seconds.

    Raises:
        TimeoutError: it took longer.
    """
    import fsspec

    try:
        if system.async_impl:  # HTTP, S3, GCS, Azure: the request is cancelled
            method = getattr(system, f"_{name}")
            return fsspec.asyn.sync(system.loop, method, *args, timeout=seconds, **kwargs)
        answers: queue.Queue[tuple[bool, Any]] = queue.Queue()

        def call() -> None:
            try:
                answers.put((True, getattr(system, name)(*args, **kwargs)))
            except Exception as error:
                answers.put((False, error))

        # It cannot be cancelled; a daemon that hangs keeps neither this thread nor the process.
        threading.Thread(target=call, daemon=True).start()
        fine, answer = answers.get(timeout=seconds)
    except (TimeoutError, queue.Empty) as error:
        raise TimeoutError(f"no answer within {seconds:.1f} s") from error
    if not fine:
        raise answer
    return answer


def _tried(action: Callable[[], Any], url: str, what: str) -> Any:
    """The result of ``action``. The libraries' errors hold the address, so that none of them is the cause of ours."""
    wait = FIRST_WAIT_SECONDS
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except PERMANENT_ERRORS as error:
            raise RemoteError(f"{what} cannot be read: {_said(error, url)}") from None
        except Exception as error:  # each store has errors of its own
            if attempt == ATTEMPTS:
                said = _said(error, url)
                raise RemoteError(f"{what} cannot be read after {ATTEMPTS} tries: {said}") from None
        time.sleep(wait * random.uniform(0.5, 1.5))
        wait = min(2 * wait, LONGEST_WAIT_SECONDS)


def _said(error: Exception, url: str) -> str:
    """Not its repr, in which aiohttp puts the request's headers."""
    said = without_secrets(f"{type(error).__name__}: {error}", url)[:MESSAGE_CHARACTERS]
    is_signed = url != shown_address(url)
    return f"{said}; the address's signature may have expired, write it anew" if is_signed else said
