"""Write a checkpoint, or say why it could not be written: a full disk ends no training.

One checkpoint is one folder, ``checkpoints/step_00000010/``::

    engine/          what DeepSpeed keeps: optimizer state, counters, one file a rank
    weights/         the model in Hugging Face form, with its processor: a resume, the next stage and export read it
    adapter/         of a LoRA run, instead of weights/: the adapter only, in peft's form
    random/          random state of each rank
    resume.json      cursor, identity of plan and model, counts of failed samples, bad steps, config
    MANIFEST.json    every file with its size and digest; written last

All ranks write into ``step_00000010.partial``; rank 0 syncs and renames it, then switches ``latest``. A process that is
killed at any moment leaves the previous checkpoint whole. What is written is a Snapshot, so that training may go on
meanwhile (checkpoints/saver.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vl3train.contracts.files import sync, sync_tree, write_whole
from vl3train.contracts.line_log import say_on_stderr
from vl3train.contracts.strict_json import json_text
from vl3train.engine.checkpoints.keep import Keep, delete_old, remove_checkpoint
from vl3train.engine.checkpoints.random_state import save_random_state
from vl3train.engine.ranks import Rank
from vl3train.engine.zero.engine_state import FOLDER, EngineState
from vl3train.engine.zero.state_files import is_of_the_disk
from vl3train.model.weights.headers.manifest import (
    MANIFEST,
    checkpoint_name,
    digests_of,
    list_files,
    manifest_text,
    share_of,
    step_of,
)

WriteWeights = Callable[[Path, dict[str, Tensor]], None]
"""(partial folder, whole weights) -> None: writes ``weights/`` or ``adapter/``. Called on rank 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What one rank has to write of a run, as it was after ``step`` steps."""

    step: int
    engine: EngineState
    random: dict[str, Any]
    resume: dict[str, Any]  # on rank 0


def write_checkpoint(
    checkpoints: Path, snapshot: Snapshot, *, write_weights: WriteWeights, rank: Rank, keep: Keep
) -> str | None:
    """Write one checkpoint, switch ``latest`` to it, delete those that ``keep`` does not name. All ranks call it.

    Returns None, or on every rank why the disk did not take it: the checkpoints before it are still there, and nothing
    of it is left.
    """
    final = checkpoints / checkpoint_name(snapshot.step)
    partial = checkpoints / (final.name + ".partial")

    def attempt(write: Callable[[], object], *, here: bool = True) -> str | None:
        """Why a file could not be written, by the first rank that says so; the same answer on every rank."""
        problem = None
        if here:
            try:
                write()
            except Exception as error:
                if not is_of_the_disk(error):
                    raise
                problem = not_written(final, error)
        return next((text for text in rank.gather(problem) if text), None)

    def write_own_files() -> None:
        snapshot.engine.write(partial / "engine")
        if rank.is_first:
            write_weights(partial, snapshot.engine.weights)
        save_random_state(partial / "random" / f"rank_{rank.index}.pt", snapshot.random)

    digests: dict[str, str] = {}

    def read_own_share() -> None:
        digests.update(digests_of(partial, share_of(list_files(partial), rank.index, rank.dp_size)))

    problem = attempt(lambda: make_partial(partial), here=rank.is_first)
    problem = problem or attempt(write_own_files)
    problem = problem or attempt(
        lambda: (partial / "resume.json").write_text(json_text(snapshot.resume, indent=1)),
        here=rank.is_first,
    )
    problem = problem or attempt(read_own_share)
    if problem is None:
        for share in rank.gather(digests):
            digests.update(share)
    problem = problem or attempt(lambda: finish(partial, final, digests, keep), here=rank.is_first)
    if problem is not None and rank.is_first:
        shutil.rmtree(partial, ignore_errors=True)
    return problem


def make_partial(partial: Path) -> None:
    """An empty folder to write into; what killed processes left is removed."""
    for left in partial.parent.glob("step_*.partial"):
        if step_of(left.stem) is not None:
            remove_checkpoint(left)
    partial.parent.mkdir(exist_ok=True)
    for name in ("", "random", "engine", f"engine/{FOLDER}"):
        (partial / name).mkdir()


def finish(partial: Path, final: Path, digests: dict[str, str], keep: Keep) -> None:
    """Write the manifest; let the checkpoint appear under its name, and delete old ones."""
    (partial / MANIFEST).write_text(manifest_text(list_files(partial), digests))
    sync_tree(partial)
    if final.exists() or final.is_symlink():  # the same step, saved by a run that was resumed from before it
        remove_checkpoint(final)
    partial.rename(final)
    sync(final.parent)
    write_whole(final.parent / "latest", final.name)
    try:
        delete_old(final.parent, newest=final.name, keep=keep)
    except OSError as error:  # the new one is whole all the same
        say_on_stderr(f"an old checkpoint could not be deleted: {error}; it stays in {final.parent}")


def not_written(checkpoint: Path, error: Exception) -> str:
    """The message for a person."""
    try:
        free = f"; {shutil.disk_usage(checkpoint.parent).free / 2**20:,.0f} MiB are free there"
    except OSError:
        free = ""
    return f"checkpoint {checkpoint} could not be written: {error}{free}"
