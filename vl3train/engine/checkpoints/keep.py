"""Which checkpoints stay when a newer one is complete."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from vl3train.engine.checkpoints.manifest import checkpoint_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """What stays, besides the newest."""

    last: int  # so many, up to the newest
    before: int  # the newest up to this step too: a run may go back to it
    every: int = 0  # all of steps that are multiples of this. 0: none
    best: int | None = None  # that of this step, whose held-out figure is the best


def delete_old(checkpoints: Path, *, newest: str, keep: Keep) -> None:
    """Delete the checkpoints up to ``newest`` that ``keep`` does not name.

    Where all are later than ``keep.before``, the oldest stays: else a run that was stopped soon after its first save
    could not go back where one that was not stopped can. A checkpoint of a step after ``newest`` is damaged, or the run
    would have resumed from it: it does not count.
    """
    folders = [folder for folder in sorted(checkpoints.glob("step_????????")) if folder.name <= newest]
    before = [folder for folder in folders if folder.name <= checkpoint_name(max(0, keep.before))]
    kept = [*folders[-keep.last :], *(before[-1:] or folders[:1])]
    for folder in folders:
        step = int(folder.name.removeprefix("step_"))
        is_multiple = keep.every > 0 and step % keep.every == 0
        if folder not in kept and step != keep.best and not is_multiple:
            shutil.rmtree(folder)
