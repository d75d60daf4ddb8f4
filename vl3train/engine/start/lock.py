"""The lock on an output folder: two runs at once would overwrite each other's checkpoints and mix their figures."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from vl3train.contracts.strict_json import json_text
from vl3train.engine.ranks import Rank

LOCK_FILE = "run.lock"


class FolderLock:
    """The lock that the first rank holds; other ranks have none."""

    def __init__(self, folder: Path, handle: int | None) -> None:
        self._folder, self._handle = folder, handle

    def taken(self) -> str | None:
        """Why the folder is no longer this run's; None where it is. A lock file that somebody removed is made anew,
        unless another run was faster. The folder must be there."""
        if self._handle is None:
            return None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._handle), os.stat(self._folder / LOCK_FILE)):
                return None
        try:
            handle = lock(self._folder)
        except BlockingIOError:
            return (
                f"run.output_dir={self._folder} is in use by {holder(self._folder)}, because the {LOCK_FILE} of this "
                "run was removed. This run ends: two at once overwrite each other's checkpoints"
            )
        except OSError:
            return None  # a disk that takes nothing now; the save says so
        self.close()
        self._handle = handle
        return None

    def close(self) -> None:
        """Free the folder."""
        if self._handle is not None:
            os.close(self._handle)


@contextlib.contextmanager
def locked_folder(folder: Path, rank: Rank) -> Iterator[FolderLock]:
    """Hold the folder for this run. All ranks call it; rank 0 holds the lock.

    The operating system frees the lock when the process ends, however it ends. Python's files close when a program is
    started in their process, so no worker inherits it.

    Raises RunError on every rank where another run holds the folder, or where the folder cannot be written.
    """
    problem, held = None, FolderLock(folder, None)
    if rank.is_first:
        try:
            held = FolderLock(folder, lock(folder))
        except BlockingIOError:
            problem = f"run.output_dir={folder} is in use by {holder(folder)}. Wait for it, stop it, or name another"
        except OSError as error:
            problem = f"run.output_dir={folder} cannot be written: {error}; name another folder"
    try:
        rank.agree(problem)
        yield held
    finally:
        held.close()


def lock(folder: Path) -> int:
    """Lock the folder; the number of the open file, which holds the lock until it is closed.

    Raises BlockingIOError where another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        text = json_text({"host": socket.gethostname(), "process": os.getpid(), "since": now})
        os.ftruncate(handle, 0)
        os.pwrite(handle, text.encode(), 0)
    except BaseException:
        os.close(handle)
        raise
    return handle


def holder(folder: Path) -> str:
    """Who holds the lock, as that process wrote it."""
    try:
        about = json.loads((folder / LOCK_FILE).read_text(encoding="utf-8"))
        return f"another run: process {about['process']} on {about['host']}, since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"
