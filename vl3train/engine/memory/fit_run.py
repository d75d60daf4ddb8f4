"""machine.memory=auto for a run: its worst pack, what an earlier start knows of it, and the fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vl3train.config.schema import TrainConfig
from vl3train.contracts.records import Batch, Cursor
from vl3train.data.extremes import blank_batch, worst_pack
from vl3train.data.loader import OpenData
from vl3train.engine.memory.device import DeviceMemory, device_memory
from vl3train.engine.memory.fit import fit_memory, row_bytes
from vl3train.engine.memory.known import KnownFit, known_fit
from vl3train.engine.zero.engine import Zero
from vl3train.model.packed_forward import PackedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class ToFit:
    """The pack that a run must have room for, and what is known of such a run."""

    batch: Batch
    name: str  # which pack it is, with an open bracket
    keys: str  # of its first samples
    memory: DeviceMemory
    known: KnownFit


def to_fit(
    cfg: TrainConfig, engine: Zero, packed: PackedModel, data: OpenData, first: Cursor, last_step: int
) -> ToFit:
    """The worst pack of steps ``first.step`` to ``last_step``. All ranks call it. Raises RunError without a GPU."""
    memory, widths = device_memory(engine.rank.device), row_bytes(packed)

    def bytes_of(patches: int, tokens: int) -> int:
        return patches * sum(widths.vision) + tokens * sum(widths.language)

    worst = worst_pack(data.plan, first, last_step, bytes_of)
    pack = worst.pack
    name = f"the worst pack (step {worst.step + 1}, {pack.num_patches:,} patches, {pack.num_tokens:,} tokens"
    if worst.steps_scanned < worst.steps_left:
        name += f"; {worst.steps_scanned:,} of {worst.steps_left:,} steps looked at"
    return ToFit(
        batch=blank_batch(data, pack, cfg.machine.loss_chunk_tokens),
        name=name,
        keys=", ".join(data.index.key(row) for row in pack.samples[:5]),
        memory=memory,
        known=known_fit(
            cfg,
            packed,
            engine.rank,
            worst_bytes=bytes_of(pack.num_patches, pack.num_tokens),
            limit_bytes=memory.limit(),
        ),
    )


def fit_run(fit: ToFit, engine: Zero, packed: PackedModel, say: Callable[[str], None]) -> None:
    """Fit the activations of the run's steps into the device; report what is tried and chosen.

    All ranks call it. Raises RunError on every rank where the worst pack does not fit.
    """
    pack_name = f"{fit.name}; samples {fit.keys}, ...)"
    fitted = fit_memory(engine, packed, fit.batch, fit.memory, pack_name=pack_name, say=say, known=fit.known)
    peak, limit = fitted.peak_bytes / 2**30, fitted.limit_bytes / 2**30
    say(f"memory: {peak:.1f} of {limit:.1f} GiB on {fit.name}): {fitted.plan}")
