"""Which checkpoints stay when a newer one is complete."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from vl3train.contracts.files import write_whole
from vl3train.model.weights.headers.manifest import checkpoints_in, step_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """What stays, besides the newest."""

    last: int  # so many, up to the newest
    before: int  # the newest up to this step too: a run may go back to it
    every: int = 0  # all of steps that are multiples of this. 0: none
    best: int | None = None  # that of this step, whose held-out figure is the best


def name_latest(checkpoint: Path) -> None:
    """Let the file ``latest`` beside a checkpoint name it."""
    file = checkpoint.parent / "latest"
    try:
        names_it = file.read_text(encoding="utf-8") == checkpoint.name
    except (FileNotFoundError, UnicodeDecodeError):
        names_it = False
    if not names_it:
        write_whole(file, checkpoint.name)


def delete_old(checkpoints: Path, *, newest: str, keep: Keep) -> None:
    """Delete the checkpoints up to ``newest`` that ``keep`` does not name.

    Where all are later than ``keep.before``, the oldest stays: else a run that was stopped soon after its first save
    could not go back where one that was not stopped can. The first after ``keep.before`` stays, too, until it takes
    the place of the one before: else that would be the oldest for ever where saves are closer than ``keep.before`` is
    behind. A checkpoint of a step after ``newest`` is damaged, or the run would have resumed from it, and does not
    count.
    """
    last = step_of(newest)
    assert last is not None, "a checkpoint's name"
    folders = {step: folder for step, folder in checkpoints_in(checkpoints).items() if step <= last}
    before = [step for step in folders if step <= max(0, keep.before)]
    after = [step for step in folders if step > max(0, keep.before)]
    kept = [*list(folders)[-keep.last :], *before[-1:], *after[:1], keep.best]
    for step, folder in folders.items():
        is_multiple = keep.every > 0 and step % keep.every == 0
        if step not in kept and not is_multiple:
            remove_checkpoint(folder)


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint. Of a link, by which somebody moved it to another disk, the link goes, and what it leads to
    stays."""
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink()
    else:
        shutil.rmtree(folder)
