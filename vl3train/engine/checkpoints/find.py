"""Which checkpoint a run resumes from: the newest that is whole, down to each byte. The same check of a start."""

from __future__ import annotations

from pathlib import Path

from vl3train.engine.ranks import Rank, RunError
from vl3train.model.weights.headers.manifest import MANIFEST, checkpoint_name, damage


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
        found = damage_seen_by_all(folder, rank)
        if not found:
            return folder, remarks
        remarks.append(f"checkpoint {folder} is not used: {shown(found)}")
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


def refuse_damaged(folder: Path, rank: Rank, *, way_out: str, below: str = "") -> None:
    """Raise RunError on every rank where files that a run wrote, with their manifest, are not what was written.

    A folder without a manifest passes: no run wrote it. All ranks call it. ``below`` as in ``damage``.
    """
    if (folder / MANIFEST).is_file() and (found := damage_seen_by_all(folder, rank, below=below)):
        raise RunError(f"{folder / below} is damaged: {shown(found)}; {way_out}")


def damage_seen_by_all(folder: Path, rank: Rank, below: str = "") -> list[str]:
    """What is wrong with a folder; each rank reads its share of the files."""
    by_rank = rank.gather(damage(folder, index=rank.index, count=rank.dp_size, below=below))
    return list(dict.fromkeys(line for lines in by_rank for line in lines))


def shown(found: list[str]) -> str:
    """The first faults in one line.

    >>> shown(["a", "b"]), shown(list("abcdefg"))
    ('a; b', 'a; b; c; d; e; and 2 more files')
    """
    return "; ".join(found[:5]) + (f"; and {len(found) - 5} more files" if len(found) > 5 else "")
