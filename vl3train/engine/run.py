"""Everything one run needs, built in order: processor, data, model, engine, resume, logs."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vl3train.config.choices import AdapterKind, Memory
from vl3train.config.plain import as_plain
from vl3train.config.rules import adapter_rates, full_rates
from vl3train.config.schema import TrainConfig
from vl3train.contracts.records import Cursor
from vl3train.data.pipeline import OpenData
from vl3train.engine.build import (
    build_model,
    clear_start,
    data_remarks,
    keep_base,
    load_processor,
    open_both,
    write_config,
    write_processor,
)
from vl3train.engine.checkpoint import find_checkpoint, load_checkpoint, refuse_other_identity
from vl3train.engine.kernels import choose_kernels
from vl3train.engine.memory.fit import fit_run
from vl3train.engine.memory.host import require
from vl3train.engine.memory.warmup import warm_up_run
from vl3train.engine.monitor.console import Console, truncate_metrics
from vl3train.engine.monitor.meter import Meter, make_meter
from vl3train.engine.monitor.wandb_tracker import Tracker
from vl3train.engine.optim.build import build_optimizer, optimizer_cost
from vl3train.engine.ranks import Rank, RunError
from vl3train.engine.zero.engine import Zero
from vl3train.model.adapters import add_adapters, save_adapter
from vl3train.model.packed_forward import PackedModel
from vl3train.model.trainable import count_parameters, parameter_groups, set_trainable
from vl3train.model.weights.from_parts import assert_rope_float32
from vl3train.model.weights.hf_folder import save_weights


@dataclass(kw_only=True)
class Run:
    """One run in progress. ``cursor`` names the next step to do; everything else stays as it was built."""

    cfg: TrainConfig
    rank: Rank
    folder: Path
    data: OpenData
    held_out: OpenData | None
    engine: Zero
    packed: PackedModel
    num_steps: int
    cursor: Cursor
    identity: dict[str, Any]
    write_weights: Callable[[Path], None]
    console: Console
    tracker: Tracker
    failed_samples: FailedSampleLimit
    meter: Meter
    source_names: list[str] = field(default_factory=list)

    def resume_state(self) -> dict[str, Any]:
        """Everything a resume needs beside the engine's own state. A missing key on load is an error."""
        return {
            "cursor": dataclasses.asdict(self.cursor),
            "identity": self.identity,
            "failed_samples": {"seen": self.failed_samples.seen, "bad": self.failed_samples.bad},
            "config": as_plain(self.cfg),
        }


@dataclass(kw_only=True)
class FailedSampleLimit:
    """Counts samples that could not be used, and stops the run when they pile up."""

    max_fraction: float
    seen: int = 0
    bad: int = 0

    def count(self, step: int, seen: int, bad: int) -> None:
        """Add one step's samples; all ranks count the same numbers.

        Raises RunError when more than ``max_fraction`` of the samples (of a thousand, while fewer were seen)
        were bad.
        """
        self.seen += seen
        self.bad += bad
        if self.bad > self.max_fraction * max(self.seen, 1000):
            raise RunError(
                f"step {step}: {self.bad} of {self.seen} samples could not be used, more than "
                f"data.max_failed_fraction={self.max_fraction} allows. Keys and reasons stand in ledger.rank*.jsonl of "
                "the output folder. Repair them, or raise the limit if you can do without them."
            )


def start_run(cfg: TrainConfig, rank: Rank) -> Run:
    """Build a run, or build it again from the newest whole checkpoint in its output folder. All ranks call it."""
    folder = Path(cfg.run.output_dir)
    console = Console(folder, stage_name=cfg.stage.name, enabled=rank.is_first)
    seed_everything(cfg.run.seed)
    checkpoint, remarks = find_checkpoint(folder / "checkpoints", rank)
    if checkpoint is None:
        clear_start(folder, rank)
    processor_dir = write_processor(cfg, folder, rank)
    if checkpoint is None and rank.is_first:
        write_config(
            cfg, folder
        )  # before all that takes long: what is left of it can be told from other people's
    data, held_out = open_both(cfg, processor_dir, rank, console)
    num_steps = cfg.run.num_steps or data.plan.total_steps(cfg.run.num_epochs)

    hf_model: Any = None
    problem = None
    try:
        hf_model = build_model(cfg, checkpoint, processor_dir)
    except (OSError, ValueError) as error:
        problem = f"the model cannot be built: {error}"
    rank.agree(problem)
    full, low_rank = full_rates(cfg), adapter_rates(cfg)
    set_trainable(hf_model, full)
    peft_model = None
    if cfg.adapter.kind is AdapterKind.lora:
        keep_base(hf_model, processor_dir, folder, rank)
        peft_model = add_adapters(hf_model, cfg.adapter)
    counts = count_parameters(hf_model)
    refuse_other_size(cfg, counts)
    groups = parameter_groups(hf_model, {**full, **low_rank}, cfg.optim.weight_decay)
    hf_model.to(rank.device)
    if rank.device.type == "cuda":
        console.message(
            "trying kernels against float64; up to two minutes where they have to be compiled first"
        )
    kernels = choose_kernels(cfg.machine, hf_model, rank)
    packed = PackedModel(
        hf_model,
        kernels.attention.name,
        recompute_vision=cfg.machine.recompute_vision,
        recompute_language=cfg.machine.recompute_language,
        compile_layers=cfg.machine.compile_layers,
        gemm_backend=kernels.gemm_backend.name,
    )
    meter = make_meter(hf_model, rank.device, recomputes_logits=not packed.makes_logits_once)
    engine = Zero(
        packed,
        build_optimizer(groups, cfg.optim, rank.device, offload_optimizer=cfg.machine.offload_optimizer),
        machine=cfg.machine,
        optim=cfg.optim,
        num_micro_batches=cfg.step.global_packs // rank.dp_size,
        rank=rank,
        save_frozen=peft_model is None,
    )
    if engine.offload_schedule is not None:
        require(
            rank,
            engine.offload_schedule.optimizer.host_bytes_to_come(),
            what="AdamW's means (machine.offload_optimizer=true)",
            way_out="set machine.offload_optimizer=false, train on more hosts, or train adapters (adapter=lora)",
            say=console.message,
        )
    assert_rope_float32(hf_model)
    engine.train(True)

    identity = run_identity(cfg, data, counts, rank)
    cursor = Cursor()
    failed_samples = FailedSampleLimit(max_fraction=cfg.data.max_failed_fraction)
    if checkpoint is not None:
        resume = refuse_other_identity(checkpoint, identity)
        refuse_what_cannot_go_on(cfg, resume, num_steps)
        load_checkpoint(checkpoint, engine=engine, rank=rank)
        cursor = Cursor(**resume["cursor"])
        failed_samples.seen, failed_samples.bad = (
            resume["failed_samples"]["seen"],
            resume["failed_samples"]["bad"],
        )
    if rank.is_first:
        truncate_metrics(folder / "metrics.jsonl", cursor.step)
        write_config(cfg, folder)

    for remark in remarks:
        console.message(remark)
    for part, (trained, total) in counts.items():
        rate = f"rate {({**full, **low_rank})[part]:g}" if trained else "frozen"
        console.message(f"{part}: {trained:,} of {total:,} parameters trained, {rate}")
    num_trained = sum(trained for trained, _ in counts.values())
    console.message(optimizer_cost(num_trained, cfg.optim, cfg.machine))
    for use, choice in kernels._asdict().items():
        console.message(f"{use}: {choice.name} ({choice.reason})")
    for text in data_remarks(data):
        console.message(text)
    console.message(
        f"{num_steps} steps of {cfg.step.global_packs} packs on {rank.dp_size} ranks"
        + (f", resumed after step {cursor.step} from {checkpoint}" if checkpoint else "")
    )
    if rank.device.type == "cuda" and cfg.machine.zero_stage < 3:
        warm_up_run(cfg, engine, packed, data, cursor, num_steps, console)
    if cfg.machine.memory is Memory.auto:
        fit_run(cfg, engine, packed, data, cursor, num_steps, console.message)
    console.start(first_step=cursor.step, total_steps=num_steps)
    tracker = Tracker(cfg.tracking, folder, as_plain(cfg), step=cursor.step, enabled=rank.is_first)

    def write_weights(partial: Path) -> None:
        state = engine.full_state_dict(hf_model)
        if not rank.is_first:
            return
        if peft_model is not None:
            save_adapter(peft_model, partial / "adapter", state_dict=state)
        else:
            save_weights(hf_model, load_processor(processor_dir), partial / "weights", state_dict=state)

    return Run(
        cfg=cfg,
        rank=rank,
        folder=folder,
        data=data,
        held_out=held_out,
        engine=engine,
        packed=packed,
        num_steps=num_steps,
        cursor=cursor,
        identity=identity,
        write_weights=write_weights,
        console=console,
        tracker=tracker,
        failed_samples=failed_samples,
        meter=meter,
        source_names=list(data.index.source_names),
    )


def seed_everything(seed: int) -> None:
    """One seed for every generator; the data's order does not use them (data/plan/order.py has its own)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def refuse_other_size(cfg: TrainConfig, counts: dict[str, tuple[int, int]]) -> None:
    """RunError where the weights are of another size than model=NAME says, as with model=2b and a 7B checkpoint."""
    if cfg.adapter.kind is AdapterKind.lora:
        return  # adapters and peft's copies are counted too
    wrong = [
        f"  {part}: {counts[part][1]:,} parameters in the weights, {size:,} in model={cfg.model.name}"
        for part, size in cfg.model.num_parameters.items()
        if counts[part][1] != size
    ]
    if wrong:
        raise RunError(
            "\n".join(["the weights to start from are not of this size:", *wrong, "choose another model="])
        )


def refuse_what_cannot_go_on(cfg: TrainConfig, resume: dict[str, Any], num_steps: int) -> None:
    """RunError, with everything at once, where a checkpoint is of the same run and this config cannot take it up."""
    found = []
    before, now = resume["config"]["optim"]["weight_decay"], cfg.optim.weight_decay
    if (before > 0) != (now > 0):
        found.append(
            f"  optim.weight_decay={now:g}, and the checkpoint has {before:g}: with it biases and norms form groups of "
            f"their own, which AdamW's stored states do not have; set optim.weight_decay={before:g}"
        )
    done = resume["cursor"]["step"]
    if done > num_steps:
        found.append(
            f"  the run has {num_steps} steps, and the checkpoint has done {done}; set run.num_steps={done} or more"
        )
    if found:
        found.append("or start a new run with another run.output_dir")
        raise RunError("\n".join([f"the run in {cfg.run.output_dir} cannot go on:", *found]))


def run_identity(
    cfg: TrainConfig, data: OpenData, counts: dict[str, tuple[int, int]], rank: Rank
) -> dict[str, Any]:
    """What a checkpoint must share with the run that resumes it."""
    return {
        "stage": cfg.stage.number,
        "plan": data.plan.describe(),
        "model": {part: {"trained": trained, "total": total} for part, (trained, total) in counts.items()},
        "adapter": as_plain(cfg.adapter),
        "machine": {
            "machine.dp_size": rank.dp_size,
            "machine.zero_stage": cfg.machine.zero_stage,
            "machine.dtype": cfg.machine.dtype.value,
            "optim.state_dtype": cfg.optim.state_dtype.value,
            "optim.master_dtype": cfg.optim.master_dtype.value,
        },
    }
