"""Delete old checkpoints of a run that is not in progress, by the rules of the run itself."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vl3train.engine.best import best_checkpoint
from vl3train.engine.checkpoints.keep import Keep, delete_old
from vl3train.engine.checkpoints.listing import Listed, list_checkpoint
from vl3train.engine.start.lock import holder, lock
from vl3train.model.weights.headers.manifest import step_of


def prune(run: Path, listed: Sequence[Listed], last: int) -> list[Listed]:
    """Delete as a run with run.keep_checkpoints= ``last`` does after a save; returns what was deleted.

    The newest that is not damaged counts as saved now. A damaged one that is newer stays, as does the best. ``listed``
    comes from ``read_newest``.

    Raises ValueError where a run is using the folder, or where all checkpoints are damaged; nothing is deleted then.
    """
    whole = [one for one in listed if not one.found]
    if not whole:
        raise ValueError(f"all checkpoints of {run} are damaged; nothing is deleted")
    newest = whole[-1]
    try:
        every = int(_run_options(newest.folder).get("keep_every_steps", 0))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:  # it has no digests
        raise ValueError(
            f"{newest.folder}/resume.json cannot be read ({error!r}); nothing is deleted"
        ) from error
    best = best_checkpoint(run)
    try:
        handle = lock(run)
    except BlockingIOError as error:
        raise ValueError(f"{run} is in use by {holder(run)}; nothing is deleted") from error
    try:
        delete_old(
            newest.folder.parent,
            newest=newest.folder.name,
            keep=Keep(
                last=last,
                before=newest.step,
                every=every,
                best=None if best is None else step_of(best.name),
            ),
        )
    finally:
        os.close(handle)
    return [one for one in listed if not os.path.lexists(one.folder)]


def read_newest(listed: Sequence[Listed]) -> list[Listed]:
    """The same list, in which the newest that is not damaged was read to its last byte, and those after it: sizes
    alone do not show that the older ones are not needed."""
    found = list(listed)
    for place in reversed(range(len(found))):
        if not found[place].found:
            found[place] = list_checkpoint(found[place].folder, read=True)
        if not found[place].found:
            break
    return found


def _run_options(checkpoint: Path) -> dict[str, Any]:
    options: dict[str, Any] = json.loads((checkpoint / "resume.json").read_text(encoding="utf-8"))["config"][
        "run"
    ]
    return options
