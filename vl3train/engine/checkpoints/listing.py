"""What a run's checkpoints are: step, size, state of their files, ranks, ZeRO stage. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl3train.model.weights.headers.manifest import (
    checkpoint_name,
    damage,
    list_files,
    read_manifest,
    step_of,
    wrong_sizes,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One checkpoint."""

    folder: Path
    num_bytes: int  # on disk
    found: list[str]  # what is wrong with its files, as far as they were looked at
    state: str  # of its files, in words
    saved_by: dict[
        str, Any
    ]  # options of the run that saved it, by name; empty where resume.json cannot be read

    @property
    def step(self) -> int:
        """Steps that were done."""
        step = step_of(self.folder.name)
        assert step is not None, "list_checkpoint refuses others"
        return step

    @property
    def starts(self) -> str:
        """What another run or a program can take from it."""
        names = [name for name in ("weights", "adapter") if (self.folder / name).is_dir()]
        return " and ".join(names) or "nothing"


def list_checkpoint(folder: Path, *, read: bool) -> Listed:
    """One checkpoint. With ``read`` every byte is read and compared with its digest, else sizes are compared only.

    Raises ValueError where the folder's name is not that of a checkpoint.
    """
    if step_of(folder.name) is None:
        raise ValueError(
            f"{folder}: a run calls its checkpoints {checkpoint_name(10)} and so on; rename this folder"
        )
    try:
        sizes, digests = read_manifest(folder)
    except ValueError as error:
        found, state = [str(error)], "damaged"
    else:
        found = damage(folder) if read else wrong_sizes(folder, sizes)
        right = "whole" if read and digests else "sizes are right"
        state = "damaged" if found else right if digests else "sizes are right; it has no digests"
    return Listed(
        folder=folder,
        num_bytes=sum(list_files(folder).values()),
        found=found,
        state=state,
        saved_by=_options(folder),
    )


def _options(folder: Path) -> dict[str, Any]:
    try:
        machine = json.loads((folder / "resume.json").read_text(encoding="utf-8"))["identity"]["machine"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return machine if isinstance(machine, dict) else {}
