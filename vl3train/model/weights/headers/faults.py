"""What is wrong with a checkpoint's folder, and the JSON files in which it is found."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

LFS_MARK = b"version https://git-lfs.github.com/spec/"
"""First bytes of the text that git leaves in place of a file it has not fetched."""


COPY_ONE = "copy or download it again"


class Fault(NamedTuple):
    """One thing that is wrong, and the way out."""

    what: str
    way_out: str


def refuse(folder: object, faults: Iterable[Fault]) -> None:
    """Raise ValueError with all ``faults`` of ``folder``, if there are any."""
    lines = [f"  {fault.what}; {fault.way_out}" for fault in faults]
    if lines:
        raise ValueError("\n".join([f"{folder} cannot be used:", *lines]))


def read_object(file: Path) -> tuple[dict[str, Any], Fault | None]:
    """The object in a JSON file, or an empty one and the reason."""
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        return {}, Fault(f"there is no {file.name}", "copy or download it as well")
    except OSError as error:
        return {}, Fault(f"{file.name} cannot be read ({error.strerror})", COPY_ONE)
    if raw.startswith(LFS_MARK):
        return {}, unfetched(file)
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return {}, Fault(f"{file.name} is damaged: it is not JSON ({error})", COPY_ONE)
    if not isinstance(content, dict):
        return {}, Fault(f"{file.name} holds no options by name", COPY_ONE)
    return content, None


def unfetched(file: Path) -> Fault:
    """The fault of a file whose content git has not fetched."""
    return Fault(
        f"{file.name} is a Git LFS pointer, not the file itself",
        "run `git lfs pull` in the folder, or download it with `hf download`",
    )


def listed(names: Iterable[str], limit: int = 6) -> str:
    """Names in order, a few of many.

    >>> listed(["b", "a", "c"], limit=2)
    'a, b and 1 more'
    """
    ordered = sorted(names)
    rest = len(ordered) - limit
    return ", ".join(ordered[:limit]) + (f" and {rest} more" if rest > 0 else "")
