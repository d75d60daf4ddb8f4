"""How the process of a rank ends after an exception: at once, with the cause as the last line printed."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
import traceback
from pathlib import Path

from vl3train.contracts.exit_codes import FAILED, INTERRUPTED
from vl3train.contracts.files import write_whole
from vl3train.contracts.progress.deaths import describe_gone_ranks
from vl3train.contracts.strict_json import json_text
from vl3train.engine.ranks import OneRankError, Rank, RunError

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable of torchrun: where each rank leaves its exception."""


FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""What the operating system says where a disk takes no more: full, over a quota, read-only, over a limit of files."""
UNUSABLE = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EIO, errno.ESTALE)
"""And where a file is not there for this user, is something else, or its disk has failed."""


def report_failure(error: BaseException, rank: Rank | None) -> int:
    """Print the cause and record it for torchrun; returns the exit code for ``ranks.leave``.

    The caller must leave through ``os._exit``: Python's own exit waits for the loader's workers, which ignore SIGTERM,
    and the other ranks would wait with it.

    Args:
        error: Any exception. A RunError is raised on every rank, and only the first prints it. A OneRankError is
            printed by the rank that raised it. Neither gets a traceback.
        rank: None where the process had not joined the group yet.
    """
    _record_for_torchrun(error)
    if isinstance(error, RunError):
        if rank is None or rank.is_first or isinstance(error, OneRankError):
            print(f"\n{error}", file=sys.stderr)
        return FAILED
    where = "before it joined the other ranks" if rank is None else f"rank {rank.index} of {rank.dp_size}"
    if isinstance(error, KeyboardInterrupt):
        print(f"\n{where}: interrupted (SIGINT); nothing was saved", file=sys.stderr)
        return INTERRUPTED
    traceback.print_exception(error)
    print(f"\n{where}: the run ends with {summary(error)}", *describe_gone_ranks(), sep="\n", file=sys.stderr)
    return FAILED


def told_of_file(error: OSError) -> str | None:
    """What a user does about a file that cannot be used; None where the fault may be ours.

    >>> told_of_file(IsADirectoryError(errno.EISDIR, "Is a directory", "best.json.7.partial", None, "best.json"))
    'best.json: Is a directory. Mend that'
    """
    name = error.filename2 or error.filename  # of a rename, the second
    if name is not None and error.errno in FULL_DISK:
        return f"{name} cannot be written: {error.strerror}. Make room for it"
    return f"{name}: {error.strerror}. Mend that" if name is not None and error.errno in UNUSABLE else None


def summary(error: BaseException) -> str:
    """One line: the class and its message.

    >>> summary(IndexError("list index out of range"))
    'IndexError: list index out of range'
    """
    return "".join(traceback.format_exception_only(error)).strip()


def _record_for_torchrun(error: BaseException) -> None:
    """Record the exception for torchrun, whose closing table names the first rank that failed, and why: for what a user
    can act on the message alone, for all else the traceback.

    The file appears whole. When one rank fails, torchrun ends the others by SIGTERM, and reads what all have left: half
    a file of a rank that was ended while it wrote would end torchrun with a traceback in place of the table.
    """
    path = os.environ.get(ERROR_FILE)
    if path is None:  # not started by torchrun
        return
    shown = str(error) if isinstance(error, RunError) else "".join(traceback.format_exception(error))
    details = {"py_callstack": shown, "timestamp": str(int(time.time()))}  # torchrun's form
    with contextlib.suppress(OSError):  # the disk may be full; the cause is printed all the same
        write_whole(Path(path), json_text({"message": {"message": summary(error), "extraInfo": details}}))
