"""What a checkpoint takes of the disk, and of the host's memory while it is written in the background."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from vl3train.engine.memory.host import free_in_groups, free_of_machine
from vl3train.engine.ranks import Rank
from vl3train.engine.zero.engine import Zero


def can_copy(
    engine: Zero, rank: Rank, checkpoints: Path, *, is_wanted: bool, say: Callable[[str], object]
) -> bool:
    """Say what saves will take, before the first one; whether the host has the memory for a copy of the state.

    All ranks call it, and get the same answer: no where any host's memory is too small, or a copy is not wanted.
    """
    shares = rank.gather(engine.bytes_to_save())
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's, of this host
    first_here = rank.index // ranks_here * ranks_here
    needed = sum(shares[first_here : first_here + ranks_here])
    free = min((known for known in (free_in_groups(), free_of_machine()) if known is not None), default=None)
    doubt = free is not None and needed > free
    disk = shutil.disk_usage(next(one for one in (checkpoints, *checkpoints.parents) if one.exists()))
    say(f"a checkpoint takes {gib(sum(shares))} of the disk, which has {gib(disk.free)} free")
    if not is_wanted:
        return False
    too_small = next(
        (text for text in rank.gather(f"{gib(free)} of {gib(needed)}" if doubt else None) if text), None
    )
    if too_small:
        say(
            f"training stops while a checkpoint is written: for a copy of the state a host has only {too_small} of "
            "memory free. Train on more hosts, or set run.save_in_background=false, which says the same"
        )
    elif needed >= 2**30:
        say(
            f"from now on {gib(needed)} of this host's memory are for a copy of the state, from which checkpoints are "
            f"written; {gib(free)} were free"
        )
    return not too_small


def gib(num_bytes: int | None) -> str:
    """Bytes for a person.

    >>> gib(3 * 2**29), gib(5 * 2**20)
    ('1.5 GiB', '5 MiB')
    """
    if num_bytes is None:
        return "an unknown amount"
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.0f} MiB"
