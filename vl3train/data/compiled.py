"""numba's ``njit``, set up before anything is compiled: processes compile alike, and each function once for all.

The compiler stops at vectors of 32 bytes unless it is told that the processor can take 64 at a time. With them, a
picture is resized in a tenth less time. The environment's ``NUMBA_CPU_FEATURES`` goes before.

What is compiled is kept on disk, in ``NUMBA_CACHE_DIR`` or beside the source. Ranks, workers and decode processes of a
first run come to the same function at the same time: one compiles it (all of them take 30 s of a core), the others
wait for its file.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numba
from llvmlite.binding import get_host_cpu_features
from numba.core.caching import FunctionCache
from numba.core.compiler_lock import global_compiler_lock

__all__ = ["njit"]

_settings: Any = numba.config
if not _settings.CPU_FEATURES:
    _settings.CPU_FEATURES = f"{get_host_cpu_features().flatten()},-prefer-256-bit"


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit`` with ``cache=True``, where several processes of a machine compile a function only once."""

    def decorate(function: Callable[..., Any]) -> Any:
        compiled = numba.njit(**options)(function)
        compiled._cache = cache = _SharedCache(function)
        compile_now = compiled.compile

        def compile_or_wait(signature: Any) -> Any:
            with global_compiler_lock:  # before the lock of the file: threads take both in one order
                try:
                    return compile_now(signature)
                finally:
                    cache.unlock()

        compiled.compile = compile_or_wait
        return compiled

    return decorate


def is_on_disk(function: Any) -> bool:
    """Whether a process has compiled a function of ``njit`` on this machine, for any types."""
    return bool(function._cache._cache_file._load_index())


class _SharedCache(FunctionCache):
    """numba's cache of a function on disk. Who finds nothing in it holds a lock until it has compiled.

    A function waits only for those that it calls, so no two processes wait for each other. The kernel gives the lock
    back when a process ends, however it ends.
    """

    _lock: IO[bytes] | None = None

    def load_overload(self, signature: Any, target: Any) -> Any:
        found = super().load_overload(signature, target)
        if found is None and self._lock is None:
            with suppress(OSError):  # no file can be written or locked here: each process compiles for itself
                self._impl.locator.ensure_cache_path()
                self._lock = (Path(self.cache_path) / f"{self._impl.filename_base}.lock").open("wb")
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            found = super().load_overload(signature, target)
        return found

    def unlock(self) -> None:
        """Let the next process compile, or find what this one did."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
