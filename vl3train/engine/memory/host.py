"""How much of the host's memory is free: a run that needs more is refused or warned, not killed without a message."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from vl3train.engine.ranks import Rank

LIMITS = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}
"""Files with the limit and the use of a control group, of version 2 and 1, by the name in /proc/self/cgroup."""


def require(
    rank: Rank, num_bytes: int, *, what: str, way_out: str, say: Callable[[str], object], already: int = 0
) -> None:
    """Refuse what the limit of a host's control group cannot hold; warn of what seems too much for the machine.

    Only the limit is certain: virtual machines get more memory as they use it, and some caches count as used. ``what``
    needs ``num_bytes`` for each rank of the host; the ranks hold ``already`` bytes of that, each. ``way_out`` says what
    a user can change; ``say`` gets the warning.

    All ranks call it before any of them allocates. Raises RunError on every rank.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's, of this host
    needed = ranks * num_bytes
    needs = (
        f"{what} need {needed / 2**30:.1f} GiB of the host's memory ({num_bytes / 2**30:.1f} GiB for each of its "
        f"{ranks} ranks), and "
    )
    problem = doubt = None
    limit, free = free_in_groups(), free_of_machine()
    if limit is not None and needed > (limit := limit + ranks * already):
        problem = f"{needs}{limit / 2**30:.1f} GiB are left of this run's limit: {way_out}"
    if free is not None and needed > (free := free + ranks * already):
        doubt = f"{needs}{free / 2**30:.1f} GiB seem to be free. If the system kills the run for its memory, {way_out}"
    rank.agree(problem)
    if found := next((text for text in rank.gather(doubt) if text), None):
        say(found)


def free_of_machine(root: Path = Path("/")) -> int | None:
    """Bytes that the kernel reports as available; None without Linux. ``root`` is the folder that holds /proc."""
    meminfo = root / "proc/meminfo"
    found = re.search(
        r"^MemAvailable:\s+(\d+) kB", meminfo.read_text() if meminfo.exists() else "", re.MULTILINE
    )
    return int(found[1]) * 1024 if found else None


def free_in_groups(root: Path = Path("/")) -> int | None:
    """Bytes left of the tightest limit of this process's control groups and their parents; None without a limit."""
    return min(_left_in_groups(root), default=None)


def _left_in_groups(root: Path) -> Iterator[int]:
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
    """Bytes of cached files, which the kernel frees when a process needs memory."""
    text = stat.read_text() if stat.exists() else ""
    sizes = re.findall(r"^(?:total_)?inactive_file (\d+)$", text, re.MULTILINE)
    return max(map(int, sizes), default=0)
