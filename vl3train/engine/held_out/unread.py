"""Held-out samples that could not be read, and so are in no figure."""

from __future__ import annotations

from collections.abc import Sequence

from vl3train.config.problems import counted
from vl3train.data.loader import FailedEntry
from vl3train.engine.ranks import Rank

SHOWN = 3


def unread_remarks(failed: Sequence[FailedEntry], rank: Rank) -> list[str]:
    """One line that names the first of those that failed on any rank, or none. All ranks call it."""
    found = [entry for part in rank.gather(list(failed)) for entry in part]
    if not found:
        return []
    shown = "; ".join(f"{entry.key}: {entry.reason}" for entry in found[:SHOWN])
    more = f"; and {len(found) - SHOWN:,} more" if len(found) > SHOWN else ""
    return [
        f"{counted(len(found), 'held-out sample')} could not be read, and no figure counts them: {shown}{more}"
    ]
