"""Where flash-attn-4 caches the kernels that it has compiled, so that the next start finds them."""

from __future__ import annotations

import hashlib
import os
import tempfile
from getpass import getuser
from pathlib import Path

from vl3train.contracts.files import make_private

ENABLED, FOLDER = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"


def cache_kernels(patched_by: str) -> None:
    """Have flash-attn-4 cache its kernels on disk, in a folder for the Python file ``patched_by``.

    By default it caches none: each process compiles them again. Its cache keys hold its own source and its libraries'
    versions (flash_attn/cute/cache_utils.py), but not what that file changes in it. So each text of the file gets its
    own folder, which no program that changes nothing shares. The user's own settings of the two variables are kept.
    What lies there is run, so that it must be a folder that only this user can write to; else nothing is cached.
    """
    text = hashlib.sha256(Path(patched_by).read_bytes()).hexdigest()[:16]
    # A local disk, as for quack and torch's compiler: the library locks files there.
    folder = Path(tempfile.gettempdir()) / f"vl3train-{getuser()}" / "flash_attn_4" / text
    if FOLDER not in os.environ and not make_private(folder, within=Path(tempfile.gettempdir())):
        return
    os.environ.setdefault(ENABLED, "1")
    os.environ.setdefault(FOLDER, str(folder))
