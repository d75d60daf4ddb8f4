"""The folder with the records of the ranks of this node and of their loader workers."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from vl3train.contracts.exit_codes import CODES_FOLDER
from vl3train.contracts.files import make_private
from vl3train.contracts.progress.record import GONE, RECORD_BYTES, Seen, process_state, progress, seen_in


def job_folder() -> Path:
    """The folder of the records of this node's ranks: the launcher's, or one that its ranks agree on by its number.

    Raises RuntimeError where somebody else could write there: a link in it would lead to any file of this user.
    """
    if launcher := os.environ.get(CODES_FOLDER):
        return Path(launcher)
    parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    folder = Path(tempfile.gettempdir()) / f"vl3train-{os.getuid()}-{parent}"
    if not make_private(folder, within=folder.parent):
        raise RuntimeError(
            f"{folder} is not this user's alone: remove it, or set TMPDIR to a folder of your own"
        )
    return folder


def read_records(folder: Path) -> list[Seen]:
    """Every record of a folder whose process lives or is a rank's; ranks first."""
    found = []
    for path in folder.glob("rank-*"):
        try:
            data = path.read_bytes()
        except OSError:
            continue  # it has just been removed
        if len(data) == RECORD_BYTES:
            found.append(seen_in(path.name, data))
    kept = (seen for seen in found if not (seen.is_worker and seen.state == GONE))
    return sorted(kept, key=lambda seen: (seen.is_worker, seen.rank, seen.name))


def remove_ended_workers() -> None:
    """Delete the records of loader workers that have ended."""
    if progress.path is not None:
        for path in progress.path.parent.glob(f"{progress.path.name}.worker-*"):
            if process_state(int(path.name.rpartition("-")[2])) == GONE:
                path.unlink(missing_ok=True)


def remove_record() -> None:
    """Delete this rank's records, where no launcher of ours reads them."""
    if progress.path is None or CODES_FOLDER in os.environ:
        return
    for path in [progress.path, *progress.path.parent.glob(f"{progress.path.name}.worker-*")]:
        path.unlink(missing_ok=True)
    try:
        progress.path.parent.rmdir()
    except OSError:
        return  # another rank is still there


def keep_record_of_rank() -> None:
    """From now on this rank's record is a file of the folder."""
    folder = job_folder()
    if CODES_FOLDER not in os.environ:  # a job of another day may have had a launcher of the same number
        for seen in read_records(folder):
            if seen.state == GONE:
                (folder / seen.name).unlink(missing_ok=True)
    progress.keep_in(folder / f"rank-{os.environ.get('RANK', '0')}")


def keep_record_of_worker(rank: Path | None, number: int) -> None:
    """The same in a loader worker of the rank whose record is ``rank``."""
    if rank is not None:
        progress.keep_in(rank.with_name(f"{rank.name}.worker-{number}-{os.getpid()}"))
