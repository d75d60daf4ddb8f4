"""Checkpoints that are whole or absent.

One checkpoint is one folder, ``checkpoints/step_00000010/``::

    engine/          written by DeepSpeed: weights, optimizer state, counters, one file a rank
    weights/         the model in Hugging Face form, with its processor: the next stage and export read it
    adapter/         of a LoRA run, instead of weights/: the adapter only, in peft's form
    random/          random state of each rank
    resume.json      cursor, identity of plan and model, counts of failed samples, config
    MANIFEST.json    every file with its size; written last

All ranks write into ``step_00000010.partial``; rank 0 syncs and renames it, then switches ``latest``. A process that is
killed at any moment leaves the previous checkpoint whole.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from vl3train.contracts.files import sync, sync_tree, write_whole
from vl3train.engine.ranks import OneRankError, Rank, RunError
from vl3train.engine.zero.engine import Zero


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` steps.

    >>> checkpoint_name(10)
    'step_00000010'
    """
    return f"step_{step:08d}"


def save_checkpoint(
    checkpoints: Path,
    step: int,
    *,
    engine: Zero,
    write_weights: Callable[[Path], None],
    resume: dict[str, Any],
    rank: Rank,
    keep: int,
) -> Path:
    """Write one checkpoint, switch ``latest`` to it, delete all but the last ``keep``. All ranks call it.

    ``write_weights`` gets the partial folder and writes ``weights/`` or ``adapter/`` into it; all ranks call it,
    because gathering partitioned weights needs them all.

    Raises OneRankError on a rank that cannot write its files, RunError on every rank where rank 0 cannot finish.
    """
    final = checkpoints / checkpoint_name(step)
    partial = checkpoints / (final.name + ".partial")
    if rank.is_first:
        for left in checkpoints.glob("step_*.partial"):  # by a process that was killed or found the disk full
            shutil.rmtree(left)
        (partial / "random").mkdir(parents=True)
    rank.barrier()
    try:
        engine.save(partial / "engine")
        write_weights(partial)
        torch.save(random_state(), partial / "random" / f"rank_{rank.index}.pt")
    except Exception as error:
        if not is_of_the_disk(error):
            raise
        raise OneRankError(not_written(final, error)) from error
    rank.barrier()
    problem = None
    if rank.is_first:
        try:
            _write_json(partial / "resume.json", resume)
            _write_json(partial / "MANIFEST.json", list_files(partial))
            sync_tree(partial)
            if final.exists():  # the same step, saved by a run that was resumed from before it
                shutil.rmtree(final)
            partial.rename(final)
            sync(checkpoints)
            write_whole(checkpoints / "latest", final.name)
            delete_old(checkpoints, newest=final.name, keep=keep)
        except OSError as error:
            problem = not_written(final, error)
    rank.agree(problem)
    return final


def is_of_the_disk(error: Exception) -> bool:
    """Whether a file could not be written. On a full disk torch's message names only a line of its own writer."""
    return isinstance(error, OSError | SafetensorError) or "inline_container" in str(error)


def not_written(checkpoint: Path, error: Exception) -> str:
    """The message for a person."""
    free = shutil.disk_usage(checkpoint.parent).free / 2**20
    return (
        f"checkpoint {checkpoint} could not be written: {error}; {free:,.0f} MiB are free there. Free disk space and "
        "start again: the run resumes from the previous checkpoint"
    )


def find_checkpoint(checkpoints: Path, rank: Rank) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and what is wrong with newer ones. Rank 0 looks; all ranks get its answer."""
    answer: list[Any] = [None]
    if rank.is_first:
        answer[0] = newest_whole(checkpoints)
    dist.broadcast_object_list(answer, src=0)
    found, remarks = answer[0]
    return (checkpoints / found if found else None), remarks


def newest_whole(checkpoints: Path) -> tuple[str | None, list[str]]:
    """Name of the newest checkpoint that has all its files in full size, and remarks on newer ones."""
    remarks = []
    for folder in sorted(checkpoints.glob("step_????????"), reverse=True):
        if damage := checkpoint_damage(folder):
            remarks.append(f"checkpoint {folder} is not used: {damage}")
        else:
            return folder.name, remarks
    return None, remarks


def checkpoint_damage(folder: Path) -> str | None:
    """Why a checkpoint is not whole, or None."""
    manifest = folder / "MANIFEST.json"
    if not manifest.exists():
        return "it has no MANIFEST.json"
    try:
        wanted = json.loads(manifest.read_text())
    except ValueError as error:
        return f"its MANIFEST.json is not JSON ({error})"
    have = list_files(folder)
    wrong = [
        f"{name} has {have.get(name, 'no')} of {size} bytes"
        for name, size in wanted.items()
        if have.get(name) != size
    ]
    return "; ".join(wrong) or None


def load_checkpoint(folder: Path, *, engine: Zero, rank: Rank) -> None:
    """Load weights, optimizer state and random state, exactly as they were."""
    engine.load(folder / "engine")
    state = torch.load(folder / "random" / f"rank_{rank.index}.pt", weights_only=False)
    set_random_state(state)


def refuse_other_identity(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The ``resume.json`` of a checkpoint that was made with the same plan, model and machine layout.

    Raises RunError that lists every difference.
    """
    resume: dict[str, Any] = json.loads((folder / "resume.json").read_text())
    saved, now = _flat(resume["identity"]), _flat(json.loads(json.dumps(identity)))
    differences = [
        f"  {key}: the checkpoint has {saved.get(key)!r}, this run has {now.get(key)!r}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    ]
    if differences:
        weights = folder / "weights"  # a LoRA run has none, and stage 1 does not start from a whole model
        as_start = weights.is_dir() and identity["stage"] > 1
        raise RunError(
            f"{folder} cannot be resumed, because this run differs from it:\n"
            + "\n".join(differences)
            + "\nEither go back to the old settings, or start a new run with another run.output_dir"
            + (f" (it can start from these weights: stage.init_from={weights})." if as_start else ".")
        )
    return resume


def delete_old(checkpoints: Path, *, newest: str, keep: int) -> None:
    """Delete all but the last ``keep`` checkpoints up to ``newest``.

    A checkpoint of a later step is damaged, or the run would have resumed from it: it does not count.
    """
    folders = sorted(checkpoints.glob("step_????????"))
    for folder in [folder for folder in folders if folder.name <= newest][:-keep]:
        shutil.rmtree(folder)


def random_state() -> dict[str, Any]:
    """State of every generator a training step may draw from (dropout of adapters)."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set the generators to a ``random_state()``. A missing key is an error."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def list_files(folder: Path) -> dict[str, int]:
    """Every file under ``folder`` with its size in bytes, except the manifest itself."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "MANIFEST.json"
    }


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[key if "." in key else prefix + key] = value  # an option's full name stays as it is
    return flat


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1))
