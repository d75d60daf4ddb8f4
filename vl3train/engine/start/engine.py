"""The fourth step of a start: the optimizer, and model and optimizer under DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable

from vl3train.config.schema import TrainConfig
from vl3train.contracts.imports.lean import run_uncompiled
from vl3train.engine.memory.host import require
from vl3train.engine.optim.build import build_optimizer
from vl3train.engine.ranks import Rank
from vl3train.engine.start.model import RunModel
from vl3train.engine.zero.engine import Zero
from vl3train.model.weights.from_parts import assert_rope_float32


def start_engine(cfg: TrainConfig, model: RunModel, rank: Rank, say: Callable[[str], object]) -> Zero:
    """Put the model under DeepSpeed, in training mode. All ranks call it.

    Raises RunError on every rank where the host cannot hold the optimizer states that machine.offload_optimizer
    puts there; ``say`` gets a warning where it only seems too small.
    """
    if not cfg.machine.compile_layers:
        run_uncompiled()
    engine = Zero(
        model.packed,
        build_optimizer(
            model.groups, cfg.optim, rank.device, offload_optimizer=cfg.machine.offload_optimizer
        ),
        machine=cfg.machine,
        optim=cfg.optim,
        num_micro_batches=cfg.step.global_packs // rank.dp_size,
        rank=rank,
        save_frozen=model.peft_model is None,
    )
    if engine.offload_schedule is not None:
        require(
            rank,
            engine.offload_schedule.optimizer.host_bytes_to_come(),
            what="AdamW's moments (machine.offload_optimizer=true)",
            way_out="set machine.offload_optimizer=false, train on more hosts, or train adapters (adapter=lora)",
            say=say,
        )
    assert_rope_float32(model.hf_model)
    engine.train(True)
    return engine
