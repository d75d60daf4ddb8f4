"""Which checkpoint a run resumes from: the newest that is whole, down to each byte."""

from __future__ import annotations

from pathlib import Path

from vl3train.engine.checkpoints.manifest import checkpoint_name, damage
from vl3train.engine.ranks import Rank, RunError


def find_checkpoint(
    checkpoints: Path, rank: Rank, *, last_step: int | None = None
) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, None where there is none at all, and why newer ones are not used.

    With ``last_step``, those of later steps do not count.

    All ranks call it: each reads its share of the files, so that all of them are read once.

    Raises RunError on every rank where there are checkpoints, and none is whole.
    """
    names: list[str] = []
    if rank.is_first:
        names = [folder.name for folder in sorted(checkpoints.glob("step_????????"), reverse=True)]
        names = [name for name in names if last_step is None or name <= checkpoint_name(last_step)]
    names = rank.gather(names)[0]
    remarks: list[str] = []
    for name in names:
        folder = checkpoints / name
        by_rank = rank.gather(damage(folder, index=rank.index, count=rank.dp_size))
        found = list(dict.fromkeys(line for lines in by_rank for line in lines))
        if not found:
            return folder, remarks
        shown = "; ".join(found[:5]) + (f"; and {len(found) - 5} more files" if len(found) > 5 else "")
        remarks.append(f"checkpoint {folder} is not used: {shown}")
    if remarks:
        raise RunError(
            "\n".join(
                [
                    f"none of the checkpoints in {checkpoints} is whole, and the run does not start over by itself:",
                    *(f"  {remark}" for remark in remarks),
                    f"Restore one from a copy. Or move {checkpoints} away: then the same command starts from the "
                    "first step.",
                ]
            )
        )
    return None, remarks
