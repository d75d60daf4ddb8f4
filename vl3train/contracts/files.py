"""Files and folders that are whole or absent: written under another name, synced to the disk, then renamed."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a path to write to; the file appears as ``path``, in place of what is there, when the block ends.

    The partial file bears this process's number, so that several processes may write the same file at once. An error in
    the block removes it; a killed process leaves ``NAME.PID.partial``. ``durable=False`` syncs nothing: for gigabytes
    that can be computed again. The error of a disk that is full names the file.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        if durable:
            sync(partial)
        partial.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        partial.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Write a small UTF-8 file: a reader sees the old text or the new, never half of it."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; it appears as ``path``, which must not exist, when the block ends.

    An error in the block removes what was written, Ctrl-C too: a full disk gets its space back. ``.NAME.partial`` of a
    process that was killed is removed first: one process at a time writes a folder.
    """
    partial = path.with_name(f".{path.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_tree(partial)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(path.parent)


def sync_tree(folder: Path) -> None:
    """``sync`` everything below a folder, and the folder."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Return when a file's content, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_private(folder: Path, within: Path) -> bool:
    """Make a folder and those above it up to ``within``; whether all are this user's and nobody else writes there."""
    above = [one for one in reversed(folder.parents) if within in one.parents]
    try:
        for one in (*above, folder):
            one.mkdir(mode=0o700, exist_ok=True)
            found = one.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
                return False
    except OSError:
        return False
    return True
