"""Which rank died, and what it did then, from the records that the ranks left."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vl3train.contracts.progress.job import read_records
from vl3train.contracts.progress.record import GONE, Seen, progress

SECONDS_OF_ONE_CAUSE = 15
"""Ranks that end this soon after the first have not been ended by torchrun: it kills 30 s after its SIGTERM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a rank ended, as torchrun saw it."""

    exit_code: int  # negative: a signal
    when: int  # seconds since 1970


def describe_deaths(ended: Mapping[int, Ended], folder: Path) -> list[str]:
    """One line for each rank that died first; ``ended`` has all ranks of this node that did not end with 0.

    A signal comes before an exception: a rank that loses the connection to one that was killed raises, and may be seen
    earlier. SIGTERM is torchrun's own.
    """
    if not ended:
        return []
    first = min(one.when for one in ended.values())
    early = {rank: one for rank, one in ended.items() if one.when - first < SECONDS_OF_ONE_CAUSE}
    killed = {
        rank: one for rank, one in early.items() if one.exit_code < 0 and one.exit_code != -signal.SIGTERM
    }
    causes = killed or {rank: one for rank, one in early.items() if one.exit_code > 0}
    seen = {record.rank: record for record in read_records(folder) if not record.is_worker}
    return [
        f"rank {rank} {_how(one.exit_code)}{_where(seen.get(rank))}" for rank, one in sorted(causes.items())
    ]


def describe_gone_ranks() -> list[str]:
    """One line for each other rank of this node whose process has ended."""
    if progress.path is None:
        return []
    own = progress.seen().rank
    return [
        f"rank {seen.rank} (process {seen.process}) has ended before{_where(seen)}"
        for seen in read_records(progress.path.parent)
        if not seen.is_worker and seen.rank != own and seen.state == GONE and seen.process != os.getpid()
    ]


def _how(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    memory = ", as the kernel does where the host's memory runs out" if -exit_code == signal.SIGKILL else ""
    return f"was killed by {name}{memory}"


def _where(seen: Seen | None) -> str:
    if seen is None:
        return " before it began"
    samples = f"; samples of the step: {seen.packs[:500]}" if seen.packs else ""
    return f"; it was in {seen.where()}{samples}"
