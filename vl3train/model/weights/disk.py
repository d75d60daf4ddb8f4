"""The disk that weights are written to: enough space before the first byte, and a plain error where it ends."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


def refuse_full_disk(folder: Path, num_bytes: int) -> None:
    """Raise OSError unless ``num_bytes`` fit on the disk of ``folder``, which need not exist yet."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        raise OSError(
            f"{folder} needs {num_bytes / 2**30:.1f} GiB and its disk has {free / 2**30:.1f} GiB free; nothing was "
            "written. Free space, or name a folder on another disk"
        )


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what a full or failing disk raises while weights are written into one OSError with the way out."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{folder} could not be written: {error}; nothing is left of it. Free space, or name a folder on another "
            "disk"
        ) from error
