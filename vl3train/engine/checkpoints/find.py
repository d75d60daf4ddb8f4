"""Which checkpoint a run resumes from: the newest that is whole, down to each byte. The same check of a start."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from vl3train.engine.ranks import Rank, RunError
from vl3train.model.weights.headers.manifest import checkpoints_in, damage
from vl3train.model.weights.headers.run_files import faults_of_start


def find_checkpoint(
    checkpoints: Path, rank: Rank, *, last_step: int | None = None
) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, None where there is none at all, and why newer ones are not used.

    With ``last_step``, those of later steps do not count.

    All ranks call it: each reads its share of the files, so that all of them are read once.

    Raises RunError on every rank where there are checkpoints, and none is whole, or where their folder is a link to
    nothing.
    """
    names: list[str] = []
    problem = None
    if rank.is_first and os.path.lexists(checkpoints) and not checkpoints.is_dir():
        what = f"a link to {os.readlink(checkpoints)}" if checkpoints.is_symlink() else "a file"
        problem = (
            f"{checkpoints} is {what}, and no folder: the run does not start over by itself. Bring the folder back, as "
            "by mounting its disk, or move this away: then the same command starts from the first step"
        )
    rank.agree(problem)
    if rank.is_first:
        found = reversed(checkpoints_in(checkpoints).items())
        names = [folder.name for step, folder in found if last_step is None or step <= last_step]
    names = rank.gather(names)[0]
    remarks: list[str] = []
    for name in names:
        folder = checkpoints / name
        faults = damage_seen_by_all(folder, rank)
        if not faults:
            return folder, remarks
        remarks.append(f"checkpoint {folder} is not used: {shown(faults)}")
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


def refuse_damaged(weights: Path, adapter: Path | None, rank: Rank, *, way_out: Mapping[Path, str]) -> None:
    """Raise RunError on every rank where weights or adapters that a run wrote are not what was written.

    All ranks call it; each reads its share of the files. ``way_out`` has a text for each of the two folders.
    """
    own = faults_of_start(weights, adapter, index=rank.index, count=rank.dp_size)
    by_rank = rank.gather(own)
    found = [
        f"{part} is damaged: {shown(faults)}; {way_out[part]}"
        for part in way_out
        if (faults := list(dict.fromkeys(line for one in by_rank for line in one.get(part, []))))
    ]
    if found:
        raise RunError("\n".join(found))


def damage_seen_by_all(folder: Path, rank: Rank) -> list[str]:
    """What is wrong with a checkpoint; each rank reads its share of the files."""
    by_rank = rank.gather(damage(folder, index=rank.index, count=rank.dp_size))
    return list(dict.fromkeys(line for lines in by_rank for line in lines))


def shown(found: list[str]) -> str:
    """The first faults in one line.

    >>> shown(["a", "b"]), shown(list("abcdefg"))
    ('a; b', 'a; b; c; d; e; and 2 more files')
    """
    return "; ".join(found[:5]) + (f"; and {len(found) - 5} more files" if len(found) > 5 else "")
