"""What is free of the host's memory, so that a run which needs more is refused and not killed without a word."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from vl3train.engine.ranks import Rank

LIMITS = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}
"""Files of a control group with its limit and its use, version 2 and 1, by what /proc/self/cgroup calls them."""


def require(rank: Rank, num_bytes: int, *, what: str, way_out: str, already: int = 0) -> None:
    """Refuse what a host cannot hold: ``what`` take ``num_bytes`` of its memory for each of its ranks, of which each
    has taken ``already``.

    All ranks call it, before any of them takes more. Raises RunError on every rank.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's, of this host
    free, needed = available_bytes(), ranks * num_bytes
    problem = None
    if free is not None and needed > (free := free + ranks * already):
        problem = (
            f"{what} take {needed / 2**30:.1f} GiB of the host's memory ({num_bytes / 2**30:.1f} GiB for each of its "
            f"{ranks} ranks), and {free / 2**30:.1f} GiB are free: {way_out}"
        )
    rank.agree(problem)


def available_bytes(root: Path = Path("/")) -> int | None:
    """What processes may take of the host's memory, of the machine's and of each control group's that limits this one.

    Linux; None where there is no /proc/meminfo to ask. ``root`` is where /proc and /sys lie.
    """
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    free = [int(found[1]) * 1024] if found else []
    return min([*free, *_free_in_groups(root)], default=None)


def _free_in_groups(root: Path) -> Iterator[int]:
    """Of each control group that this process is in and those around it. What caches hold counts as free."""
    membership = root / "proc/self/cgroup"
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, path = line.split(":", 2)
        name = "memory" if "memory" in controllers.split(",") else controllers
        if name not in LIMITS:
            continue
        mount = root / "sys/fs/cgroup" / name
        inside = mount / path.lstrip("/")
        for folder in (inside, *inside.parents):
            limit, used = (folder / file for file in LIMITS[name])
            if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
                yield int(text) - int(used.read_text()) + _cached(folder / "memory.stat")
            if folder == mount:
                break


def _cached(stat: Path) -> int:
    """Bytes of files that the kernel lets go of when memory is asked for."""
    text = stat.read_text() if stat.exists() else ""
    sizes = re.findall(r"^(?:total_)?inactive_file (\d+)$", text, re.MULTILINE)
    return max(map(int, sizes), default=0)
