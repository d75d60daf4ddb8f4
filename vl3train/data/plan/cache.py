"""Planned epochs on disk: all processes of a node map them into memory, and one plans them.

``FOLDER/<plan fingerprint>/epoch-N.order.npy`` and ``epoch-N.bounds.npy``. A file appears under its name only when
it is whole, with its digest at the end; two processes that write the same one write the same bytes. A damaged file is
named and made again. Everything here may be deleted. The start of a run deletes what no run has used for
``UNUSED_DAYS``, rows of indexes (sample_table.py) included.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from itertools import chain
from pathlib import Path

import numpy as np

from vl3train.contracts.files import whole_file
from vl3train.data.sealed import DamagedFileError, seal, sealed_size

UNUSED_DAYS = 90
OURS = ("index-*.arrow", "*/epoch-*.npy", "*.partial", "*/*.partial")


def delete_unused(folder: Path) -> None:
    """Delete what no run used for ``UNUSED_DAYS``: each index and recipe has its own files, 2 GB for 10 M samples."""
    oldest = time.time() - UNUSED_DAYS * 86_400
    for file in list(chain.from_iterable(folder.glob(pattern) for pattern in OURS)):
        try:
            if file.stat().st_mtime < oldest:
                file.unlink()
        except (FileNotFoundError, PermissionError):
            continue  # another process of the run was first, or it is somebody else's


def mark_used(file: Path) -> None:
    """Set the time of change, which stands for the last use: not every file system keeps the time of reading."""
    with contextlib.suppress(PermissionError):  # somebody else's folder, theirs to clean
        os.utime(file)


def default_folder() -> Path:
    """The user's cache folder for plans: ``$XDG_CACHE_HOME``, or ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vl3train" / "plans"


def load_epoch(folder: Path, epoch: int, num_entries: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Order and bounds of an epoch, mapped; None where they are not there whole.

    Args:
        folder: of one plan.
        epoch: its number.
        num_entries: how many samples it must have.
    """
    bounds = load_bounds(folder, epoch, num_entries)
    order = _mapped(_file(folder, epoch, "order"))
    if bounds is None or order is None or len(order) != num_entries:
        return None
    return order, bounds


def load_bounds(folder: Path, epoch: int, num_entries: int) -> np.ndarray | None:
    """Where each step of an epoch begins, mapped; kept for epochs whose order is gone."""
    bounds = _mapped(_file(folder, epoch, "bounds"))
    return bounds if bounds is not None and bounds[-1] == num_entries else None


def save_epoch(folder: Path, epoch: int, order: np.ndarray, bounds: np.ndarray) -> None:
    """Write an epoch, and delete the orders of those before the last one."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(_file(folder, epoch, "order"), order)
    _write(_file(folder, epoch, "bounds"), bounds)
    for old in range(epoch - 1):
        _file(folder, old, "order").unlink(missing_ok=True)


def _file(folder: Path, epoch: int, what: str) -> Path:
    return folder / f"epoch-{epoch}.{what}.npy"


def whole_size(file: Path) -> int | None:
    """Bytes of a file of this cache without its digest; None where it is not there, or damaged, which is told."""
    try:
        return sealed_size(file)
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        warnings.warn(f"{error} and is made again", stacklevel=2)
        return None


def _mapped(file: Path) -> np.ndarray | None:
    if whole_size(file) is None:
        return None
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:  # another process deleted it meanwhile
        return None
    mark_used(file)
    return found if len(found) else None


def _write(file: Path, array: np.ndarray) -> None:
    with whole_file(file) as partial:
        with partial.open("wb") as stream:
            np.save(stream, array)
        seal(partial)
