"""The message when a GPU is out of memory: where it happened, which packs were there, and which options save memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from vl3train.config.choices import AdapterKind, Base4Bit, Dtype, Memory, Recompute
from vl3train.config.schema import TrainConfig
from vl3train.contracts.records import Batch
from vl3train.engine.ranks import OneRankError, Rank


@contextmanager
def explain_oom(cfg: TrainConfig, rank: Rank, doing: str, batches: Sequence[Batch] = ()) -> Iterator[None]:
    """Turn torch.OutOfMemoryError into OneRankError: the other ranks do not know of it, and wait.

    ``doing`` completes "out of memory while ..."; ``batches`` are those of this rank in the step, if it was in one.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).partition("\n")[0]
        packs = ", ".join(
            f"{batch.num_planned_tokens:,} tokens and {len(batch.pixel_values):,} patches"
            for batch in batches
        )
        raise OneRankError(
            f"rank {rank.index}: out of memory while {doing}: {first}\n"
            + (f"Packs of this rank in the step: {packs}.\n" if packs else "")
            + "Options that save memory:\n"
            + "\n".join(f"  {way_out}" for way_out in ways_out(cfg, in_a_step=bool(batches)))
        ) from error


def ways_out(cfg: TrainConfig, *, in_a_step: bool) -> list[str]:
    """Options that the run does not use yet, the cheapest first."""
    machine, optim = cfg.machine, cfg.optim
    found = []
    if in_a_step and machine.memory is Memory.given:
        found.append("machine.memory=auto: layers recompute only as much as each pack needs to fit")
        if {machine.recompute_vision, machine.recompute_language} - {Recompute.layer, Recompute.offload}:
            found.append(
                "machine.recompute_vision=layer machine.recompute_language=layer: layers recompute everything"
            )
    if machine.dtype is Dtype.float32:
        found.append("machine.dtype=bfloat16: half the bytes of weights and activations")
    elif machine.zero_stage == 1 and optim.state_dtype is Dtype.float32 and not machine.offload_optimizer:
        found.append(
            "machine.offload_optimizer=true: 8 bytes less for each trained parameter of this rank's share"
        )
    if machine.zero_stage < 3:
        found.append("more GPUs, or machine.zero_stage=3 on these: weights are partitioned too")
    if cfg.adapter.kind is AdapterKind.none:
        found.append("adapter=lora: only adapters have gradients and optimizer state")
    elif cfg.adapter.base_4bit is Base4Bit.none and machine.zero_stage < 3:
        found.append("adapter.base_4bit=nf4: frozen weights take about a quarter of the bytes")
    if in_a_step:
        found.append(
            f"step.max_tokens below {cfg.step.max_tokens}, step.max_patches below {cfg.step.max_patches}"
        )
    return found
