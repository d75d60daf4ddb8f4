"""What this machine has found out once, and need not find out again: kept on disk, each under a key.

A file holds its whole key beside its value, and is written whole or not at all. So a value is read only where every
part of the key is as it was: a file that is damaged, of another key or of another user's making is as one that is not
there. What lies here may be deleted at any time; it is found out again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from getpass import getuser
from pathlib import Path
from typing import Any

from vl3train.contracts.files import make_private, whole_file
from vl3train.contracts.strict_json import json_text

FOLDER = "VL3TRAIN_CACHE_DIR"
"""Environment variable that names another folder, as of a disk that stays when a job has ended."""


def kept_folder() -> Path | None:
    """Where values lie; None where no folder is this user's alone."""
    if given := os.environ.get(FOLDER):
        return Path(given) / "kept"
    within = Path(tempfile.gettempdir())
    folder = within / f"vl3train-{getuser()}" / "kept"
    return folder if make_private(folder, within) else None


def read_kept(key: Mapping[str, Any]) -> Any:
    """The value that was kept under exactly this key, or None."""
    text, folder = _key_text(key), kept_folder()
    if folder is None:
        return None
    try:
        found = json.loads(_file(folder, text).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("key") != json.loads(text):
        return None
    return found.get("value")


def keep(key: Mapping[str, Any], value: Any) -> None:
    """Keep a value, which is JSON, under a key. Where the disk does not take it, it is found out again."""
    text, folder = _key_text(key), kept_folder()
    if folder is None:
        return
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(_file(folder, text), durable=False) as partial:
            partial.write_text(json_text({"key": json.loads(text), "value": value}), encoding="utf-8")


def forget(key: Mapping[str, Any]) -> None:
    """Take away what was kept under a key."""
    if (folder := kept_folder()) is not None:
        with contextlib.suppress(OSError):
            _file(folder, _key_text(key)).unlink()


def _key_text(key: Mapping[str, Any]) -> str:
    return json_text(dict(key), sort_keys=True)


def _file(folder: Path, text: str) -> Path:
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
