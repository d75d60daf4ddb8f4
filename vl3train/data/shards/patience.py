"""Reads of shards on storage that fails for a while: network file systems report errors, or block, until they are back.

An error is tried again for some time, because ESTALE, EIO, or a shard that is not there while its server restarts, do
not mean that the sample is lost. A read that blocks is never given up: the report about silence names it. It begins
anew once the path leads to another file, as after a mount that was replaced.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.1, 5.0
"""Between two tries; the waits double."""
LOOK_SECONDS = 1.0
"""While a read blocks, the path is looked at this often."""


class ReplacedError(OSError):
    """The read blocked, and its path leads to another file now."""


class Patience:
    """How long this process waits for shards. One that was waited for in vain is not waited for again until it reads.

    Its folder neither: a storage that is lost for good costs the time once, not once a sample.
    """

    def __init__(self) -> None:
        self._in_vain: set[Path] = set()

    def read(self, shard: Path, read: Callable[[], T], seconds: float) -> T:
        """What ``read`` returns, which opens the shard; tried again while it raises OSError, for some seconds.

        Raises OSError: that of the last try.
        """
        deadline, wait = time.monotonic() + seconds, FIRST_WAIT_SECONDS
        reported = False
        while True:
            try:
                with begun_anew_if_replaced(shard):
                    result = read()
            except ReplacedError:
                continue
            except OSError as error:
                waits = seconds > 0 and not self._in_vain & {shard, shard.parent}
                if not waits or time.monotonic() + wait > deadline:
                    if waits:
                        self._in_vain |= {shard, shard.parent}
                    raise
                if not reported:
                    _say(f"{shard} cannot be read: {error}. It is tried again for {seconds:g} s")
                reported = True
                time.sleep(wait * random.uniform(0.5, 1.0))
                wait = min(2 * wait, LONGEST_WAIT_SECONDS)
                continue
            self._in_vain -= {shard, shard.parent}
            if reported:
                _say(f"{shard} can be read again")
            return result


def _say(text: str) -> None:
    print(f"\n{text}", file=sys.stderr, flush=True)


@contextmanager
def begun_anew_if_replaced(path: Path) -> Iterator[None]:
    """End a blocked system call with ReplacedError as soon as the path leads to another file than now.

    Only in a main thread: Python handles signals there. In others the call blocks on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _file_at(path)

    def look(*_: object) -> None:
        now = _file_at(path)
        if now is not None and now != before:
            raise ReplacedError(f"{path} was replaced")

    handler = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, LOOK_SECONDS, LOOK_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, handler)


def _file_at(path: Path) -> tuple[int, int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino
