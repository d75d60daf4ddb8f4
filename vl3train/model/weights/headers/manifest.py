"""The list of a checkpoint's files with a digest of each, and what is wrong with a checkpoint. Imports no torch.

The digest is XXH3 of 128 bits: 8.7 GB a second on one core where sha256 takes 1.4 (an EPYC core, xxhash 4.1). It finds
damage by disks, memory and networks. It is no protection from a person who changes a file on purpose: what such a file
can do is bounded by how it is read (docs/security.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from vl3train.contracts.files import write_whole
from vl3train.contracts.strict_json import json_text

MANIFEST = "MANIFEST.json"
CHUNK_BYTES = 16 * 2**20
READ_BY_NAME = (
    *(".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt"),
    "adapter_config.json",  # transformers then takes the folder for adapters
)


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` steps.

    >>> checkpoint_name(10)
    'step_00000010'
    """
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder; None for another name, as of a copy that somebody made beside it.

    >>> step_of("step_00000010"), step_of("step_old_copy")
    (10, None)
    """
    found = re.fullmatch(r"step_(\d{8,})", name, re.ASCII)
    return int(found[1]) if found and checkpoint_name(int(found[1])) == name else None


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """What bears the name of a checkpoint, by its step, in the order of steps. It may be damaged, or no folder."""
    found = {step: path for path in folder.glob("step_*") if (step := step_of(path.name)) is not None}
    return dict(sorted(found.items()))


def list_files(folder: Path) -> dict[str, int]:
    """Every file under ``folder`` with its size in bytes, except the manifest itself."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def file_digest(path: Path) -> str:
    """XXH3 of a file, 32 hex digits."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return str(digest.hexdigest())


def share_of(sizes: Mapping[str, int], index: int, count: int) -> list[str]:
    """The files of one of ``count`` readers: each reader gets about the same number of bytes.

    >>> [share_of({"a": 5, "b": 3, "c": 2}, index, 2) for index in (0, 1)]
    [['a'], ['b', 'c']]
    """
    shares: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += sizes[name]
    return shares[index]


def digests_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The digests of some files of a folder."""
    return {name: file_digest(folder / name) for name in names}


def manifest_text(sizes: Mapping[str, int], digests: Mapping[str, str]) -> str:
    """What MANIFEST.json holds: the files, and a digest of this list itself."""
    files = {name: {"bytes": size, "xxh3_128": digests[name]} for name, size in sizes.items()}
    return json_text({"files": files, "xxh3_128": list_digest(files)}, indent=1)


def list_digest(files: Mapping[str, Any]) -> str:
    """XXH3 of the list of files, without the spaces and line ends of its JSON."""
    return xxhash.xxh3_128(json.dumps(files, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path) -> None:
    """Write the manifest of a folder that is whole."""
    sizes = list_files(folder)
    write_whole(folder / MANIFEST, manifest_text(sizes, digests_of(folder, sizes)))


def read_manifest(folder: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Sizes and digests of the files that a checkpoint must have. Before 2026-12 there were sizes only.

    Raises:
        ValueError: the manifest is missing or damaged; the message says so.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"it has no {MANIFEST}")
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        if "files" not in content:
            return {name: _whole_number(size) for name, size in content.items()}, {}
        if content.get("xxh3_128", whole := list_digest(content["files"])) != whole:
            raise ValueError("its own digest differs")
        entries = content["files"].items()
        sizes = {name: _whole_number(entry["bytes"]) for name, entry in entries}
        return sizes, {name: str(entry["xxh3_128"]) for name, entry in entries}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"its {MANIFEST} is damaged ({error!r})") from error


def _whole_number(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no size in bytes")
    return value


def wrong_sizes(folder: Path, sizes: Mapping[str, int]) -> list[str]:
    """Files that are missing or of another size."""
    have = list_files(folder)
    return [
        f"{name} has {have[name]} of {size} bytes" if name in have else f"{name} is missing ({size} bytes)"
        for name, size in sizes.items()
        if have.get(name) != size
    ]


def wrong_digests(folder: Path, digests: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """Those of ``names`` whose content is not what was written, or cannot be read."""
    found = []
    for name in names:
        if name not in digests:
            continue
        try:
            if file_digest(folder / name) != digests[name]:
                found.append(f"{name} is not what was written: its digest differs")
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror or error}")
    return found


def damage(folder: Path, *, index: int = 0, count: int = 1, below: str = "") -> list[str]:
    """What is wrong with a checkpoint, by its sizes and, of this reader's share of the files, by their content.

    Args:
        folder: of one checkpoint.
        index: of this reader, out of ``count``; each reads its share.
        count: readers.
        below: look only at files whose names begin so, as "weights/".
    """
    try:
        sizes, digests = read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    strange = unlisted(folder, sizes, below)
    sizes = {name: size for name, size in sizes.items() if name.startswith(below)}
    return (
        strange or wrong_sizes(folder, sizes) or wrong_digests(folder, digests, share_of(sizes, index, count))
    )


def unlisted(folder: Path, sizes: Mapping[str, int], below: str) -> list[str]:
    """Files with the name of a state or of weights that the manifest does not list: who reads the folder would take
    them, as DeepSpeed and transformers do. Others, as notes, are no damage."""
    return [
        f"{name} is no file of the checkpoint; take it out"
        for name in list_files(folder)
        if name.startswith(below) and name not in sizes and name.endswith(READ_BY_NAME)
    ]
