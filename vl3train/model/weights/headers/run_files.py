"""What a start takes of files that runs wrote: are they what was written, and is the base that of the adapters?

Imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path

from vl3train.model.weights.headers.manifest import MANIFEST, damage, list_digest

RESUME = "resume.json"
"""In each checkpoint of a run."""


def faults_of_start(
    weights: Path, adapter: Path | None, *, index: int = 0, count: int = 1
) -> dict[Path, list[str]]:
    """What is wrong with weights, and with adapters on them, by folder. Folders that no run wrote pass.

    A checkpoint has a manifest: one that lost it is damaged, and may be anything.

    Args:
        weights: the folder of weights.
        adapter: the folder of adapters that are on them, or None.
        index: of this reader, out of ``count``; each reads its share of the files.
        count: readers.
    """
    found = {}
    for part in [weights] if adapter is None else [adapter, weights]:
        checkpoint = part.parent
        if any((checkpoint / name).is_file() for name in (MANIFEST, RESUME)):
            found[part] = damage(checkpoint, index=index, count=count, below=f"{part.name}/")
        elif (part / MANIFEST).is_file():
            found[part] = damage(part, index=index, count=count)
    if adapter is not None and weights.parent != adapter.parent:
        found[weights] = faults_of_base(weights, adapter.parent, index=index, count=count)
    return {part: faults for part, faults in found.items() if faults}


def faults_of_base(base: Path, checkpoint: Path, *, index: int = 0, count: int = 1) -> list[str]:
    """What is wrong with the weights that a checkpoint's adapters were trained on.

    The checkpoint keeps the digest of the base's manifest. Before 2026-12 it kept none, and earlier the base had no
    manifest either: then its content is not known, and it passes (``base_remark``).
    """
    if fault := fault_of_manifest(base, checkpoint):
        return [fault]
    return damage(base, index=index, count=count) if (base / MANIFEST).is_file() else []


def fault_of_manifest(base: Path, checkpoint: Path) -> str | None:
    """Why the base's manifest says nothing of these adapters' base; None where it does, or none is expected."""
    recorded = recorded_base(checkpoint)
    if recorded is None:
        return None
    if not (base / MANIFEST).is_file():
        return f"it has no {MANIFEST}, and had one when {checkpoint} was saved"
    if manifest_digest(base) not in (recorded, None):  # None: damaged, and told so
        return f"its {MANIFEST} is not that of the base that {checkpoint} was trained on"
    return None


def base_remark(base: Path, checkpoint: Path) -> str | None:
    """What to say of a base whose content cannot be compared with anything."""
    if recorded_base(checkpoint) is not None or (base / MANIFEST).is_file() or not base.is_dir():
        return None
    return (
        f"{base} has no {MANIFEST}, as builds before 2026-12 left it: nobody can say whether these weights are those "
        "that the adapters were trained on"
    )


def recorded_base(checkpoint: Path) -> str | None:
    """The digest of the base's manifest that a checkpoint of adapters keeps; None where it keeps none."""
    try:
        found = json.loads((checkpoint / RESUME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    recorded = found.get("base") if isinstance(found, dict) else None
    return recorded if isinstance(recorded, str) else None


def manifest_digest(folder: Path) -> str | None:
    """The digest of a folder's list of files; None where it has no such list that can be read."""
    try:
        return list_digest(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
