"""Read a checkpoint: refuse that of another run, then set weights, optimizer and random state."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from vl3train.config.paths import what_adapts
from vl3train.contracts.strict_json import json_text
from vl3train.engine.checkpoints.random_state import load_random_state_of
from vl3train.engine.ranks import OneRankError, Rank, RunError
from vl3train.engine.zero.engine import Zero
from vl3train.engine.zero.reshard.layouts import Layout
from vl3train.engine.zero.reshard.load import load_other_layout

ADAPTERS_CHANGED = (
    "  adapter: since that run, adapter=lora was changed to train adapters only, at a rate of 1e-4, with alpha = 2 x "
    "rank. A new run trains as that one did with adapter.modules_to_save=[projector,vision_encoder] adapter.alpha=16 "
    "adapter.dropout=0.05 adapter.learning_rate=null"
)


def load_checkpoint(folder: Path, *, engine: Zero, rank: Rank) -> Layout | None:
    """Load weights, optimizer state and random state, exactly as they were.

    The number of ranks and the ZeRO stage may be others than those of the checkpoint: returns these then, else None.

    Raises RunError on every rank where the state cannot take the layout of this run, and OneRankError where a file
    holds code, or objects of other classes than a checkpoint has.
    """
    saved = layout_of(json.loads((folder / "resume.json").read_text()))
    now = Layout(dp_size=rank.dp_size, zero_stage=engine.zero_stage)
    try:
        if saved == now:
            engine.load(folder / "engine")
        else:
            load_other_layout(engine, folder / "engine", saved)
        load_random_state_of(folder / "random", rank.index)
    except UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        held = f"an object of {named[1]}" if named else "something that is no number"
        raise OneRankError(
            f"rank {rank.index}: {folder} is not read, because a file of it holds {held}, and reading that could "
            "run code. This program wrote no such file. If you know where it comes from, start a new run from its "
            f"weights (stage.init_from={start_of(folder)}); they are safetensors"
        ) from error
    return None if saved == now else saved


def layout_of(resume: dict[str, Any]) -> Layout:
    """How the state of a checkpoint is divided, from its ``resume.json``."""
    machine = resume["identity"]["machine"]
    return Layout(dp_size=machine["machine.dp_size"], zero_stage=machine["machine.zero_stage"])


def start_of(checkpoint: Path) -> Path:
    """What another run can name as its start: the weights, or the checkpoint of adapters, which are then merged."""
    weights = checkpoint / "weights"
    return weights if weights.is_dir() else checkpoint


FREE = ("machine.dp_size", "machine.zero_stage")
"""What of a run's identity may change: load_checkpoint moves the state."""
MOST_TOGETHER = "plan.max_family_records"


def refuse_other_identity(
    folder: Path, identity: dict[str, Any], data_changes: Callable[[], list[str]] = list
) -> dict[str, Any]:
    """The ``resume.json`` of a checkpoint that was made with the same plan, model and numbers.

    ``data_changes`` says in lines what changed where the index of the data is another one.

    Raises RunError that lists every difference.
    """
    resume: dict[str, Any] = json.loads((folder / "resume.json").read_text())
    stored = {**resume["identity"], "adapter": what_adapts(resume["identity"]["adapter"])}
    saved, now = _flat(stored), _flat(json.loads(json_text(identity)))
    differences = [
        f"  {key}: the checkpoint has {saved.get(key)!r}, this run has {now.get(key)!r}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key) and key not in FREE
    ]
    if differences:
        if saved.get("plan.index") != now.get("plan.index"):
            differences += [f"  data: {line}" for line in data_changes()]
        if saved.get(MOST_TOGETHER) != now.get(MOST_TOGETHER):
            differences.append(
                f"  ({MOST_TOGETHER} is data.max_family_records, or None without data.share_prefix=true)"
            )
        if stored["adapter"]["kind"] == "lora" and "modules_to_save" not in stored["adapter"]:
            differences.append(ADAPTERS_CHANGED)
        holds_weights = any((folder / name).is_dir() for name in ("weights", "adapter"))
        as_start = holds_weights and identity["stage"] > 1  # stage 1 does not start from a whole model
        raise RunError(
            f"{folder} cannot be resumed, because this run differs from it:\n"
            + "\n".join(differences)
            + "\nEither go back to the old settings, or start a new run with another run.output_dir"
            + (
                f" (it can start from these weights: stage.init_from={start_of(folder)})."
                if as_start
                else "."
            )
        )
    return resume


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[key if "." in key else prefix + key] = value  # an option's full name stays as it is
    return flat
