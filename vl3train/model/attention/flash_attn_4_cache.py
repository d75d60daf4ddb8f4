"""Where flash-attn-4 keeps the kernels that it has compiled, so that the next start finds them."""

from __future__ import annotations

import hashlib
import os
import tempfile
from getpass import getuser
from pathlib import Path

ENABLED, FOLDER = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"


def keep_kernels(mended_by: str) -> None:
    """Have flash-attn-4 keep its kernels on disk, in a folder for ``mended_by``, a file of Python.

    It keeps none by default: each process compiles them anew. Its names of kernels hold its own source and its
    libraries' versions (flash_attn/cute/cache_utils.py), not what that file changes in it: hence a folder for each
    text of the file, and none that is shared with programs which change nothing. The user's own settings of the two
    variables stand.
    """
    text = hashlib.sha256(Path(mended_by).read_bytes()).hexdigest()[:16]
    # A disk of this machine, as quack and torch's compiler have it: the library locks files there.
    folder = Path(tempfile.gettempdir()) / getuser() / "vl3train_flash_attn_4" / text
    os.environ.setdefault(ENABLED, "1")
    os.environ.setdefault(FOLDER, str(folder))
