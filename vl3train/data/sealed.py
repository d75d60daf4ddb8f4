"""Files that say whether they are damaged: a digest of their bytes, checked before anything else reads them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vl3train.contracts.files import write_whole
from vl3train.contracts.strict_json import json_text

DIGEST_BYTES = 32
"""Of a sha256, behind the content of a sealed file."""


class DamagedFileError(ValueError):
    """A file whose bytes are not those that were written."""


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex. A gigabyte takes about a second."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(path: Path) -> None:
    """Append the digest of a file to it."""
    digest = bytes.fromhex(file_digest(path))
    with path.open("ab") as file:
        file.write(digest)


def sealed_size(path: Path) -> int:
    """Bytes of a sealed file without its digest.

    Raises:
        DamagedFileError: it is not whole, or other bytes than those that were sealed.
        FileNotFoundError: there is none.
    """
    digest, size = hashlib.sha256(), path.stat().st_size - DIGEST_BYTES
    with path.open("rb") as file:
        left = size
        while left > 0 and (data := file.read(min(left, 2**20))):
            digest.update(data)
            left -= len(data)
        if size < 0 or left or file.read() != digest.digest():
            raise DamagedFileError(f"{path} is damaged")
    return size


def write_sealed_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object with the digest of its text, ``sha256``."""
    write_whole(path, json_text({"sha256": _json_digest(content), **content}, indent=1))


def read_sealed_json(path: Path) -> dict[str, Any]:
    """What ``write_sealed_json`` wrote.

    Raises:
        DamagedFileError: it is no JSON, or other than what was written.
        FileNotFoundError: there is none.
    """
    try:
        content = json.loads(path.read_bytes())
        digest = content.pop("sha256")
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
        raise DamagedFileError(f"{path} is damaged") from error
    if not isinstance(content, dict) or digest != _json_digest(content):
        raise DamagedFileError(f"{path} is damaged")
    return content


def _json_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
