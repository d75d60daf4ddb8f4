"""A disk that is full."""

from __future__ import annotations

import contextlib
import resource


@contextlib.contextmanager
def files_of_at_most(size):
    """The operating system refuses longer files, as a full disk does: in the middle of a write.

    Python ignores the signal that comes with it.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
