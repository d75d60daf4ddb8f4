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

from vl3train.config.load import resolve_weights, save_config
from vl3train.config.rules import effective_learning_rates
from vl3train.config.schema import AdapterKind, Dtype, TrainConfig, as_plain
from vl3train.contracts.records import Cursor
from vl3train.data.pipeline import OpenData, open_data
from vl3train.engine.checkpoint import find_checkpoint, load_checkpoint, refuse_other_identity
from vl3train.engine.console import Console, truncate_metrics
from vl3train.engine.optim import build_optimizer
from vl3train.engine.ranks import Rank
from vl3train.engine.track import Tracker
from vl3train.engine.zero import Zero
from vl3train.model.adapters import add_adapters, base_state_dict, save_adapter
from vl3train.model.attention import choose_attention
from vl3train.model.conversion import build_processor, save_weights
from vl3train.model.init_from_parts import assert_rope_float32, init_from_parts, load_model
from vl3train.model.packed_forward import PackedModel
from vl3train.model.trainable import count_parameters, parameter_groups, set_trainable


@dataclass(kw_only=True)
class Run:
    """One run in progress. ``cursor`` names the next step to do; everything else stays as it was built."""

    cfg: TrainConfig
    rank: Rank
    folder: Path
    data: OpenData
    held_out: OpenData | None
    engine: Zero
    num_steps: int
    cursor: Cursor
    identity: dict[str, Any]
    write_weights: Callable[[Path], None]
    console: Console
    tracker: Tracker
    bad_samples: BadSampleLimit
    source_names: list[str] = field(default_factory=list)

    def resume_state(self) -> dict[str, Any]:
        """Everything a resume needs beside the engine's own state. A missing key on load is an error."""
        return {
            "cursor": dataclasses.asdict(self.cursor),
            "identity": self.identity,
            "bad_samples": {"seen": self.bad_samples.seen, "bad": self.bad_samples.bad},
            "config": as_plain(self.cfg),
        }

    def finish(self) -> None:
        """Close console and tracker after the last act."""
        self.console.close()
        self.tracker.finish(0)


@dataclass(kw_only=True)
class BadSampleLimit:
    """Counts samples that could not be used, and stops the run when they pile up."""

    max_fraction: float
    seen: int = 0
    bad: int = 0

    def count(self, step: int, seen: int, bad: int) -> None:
        """Add one step's samples; all ranks count the same numbers.

        Raises RuntimeError when more than ``max_fraction`` of the samples (of a thousand, while fewer were seen)
        were bad.
        """
        self.seen += seen
        self.bad += bad
        if self.bad > self.max_fraction * max(self.seen, 1000):
            raise RuntimeError(
                f"step {step}: {self.bad} of {self.seen} samples could not be used, more than "
                f"data.max_bad_fraction={self.max_fraction} allows. Keys and reasons stand in ledger.rank*.jsonl of "
                "the output folder. Repair them, or raise the limit if you can do without them."
            )


def start_run(cfg: TrainConfig, rank: Rank) -> Run:
    """Build a run, or build it again from the newest whole checkpoint in its output folder. All ranks call it."""
    folder = Path(cfg.run.output_dir)
    console = Console(folder, stage_name=cfg.stage.name, enabled=rank.is_first)
    seed_everything(cfg.run.seed)

    checkpoint, remarks = find_checkpoint(folder / "checkpoints", rank)
    for remark in remarks:
        console.message(remark)
    processor_dir = write_processor(cfg, folder, rank)
    data, held_out = open_both(cfg, processor_dir, rank, console)

    hf_model = build_model(cfg, checkpoint, rank, processor_dir)
    rates = effective_learning_rates(cfg)
    set_trainable(hf_model, rates)
    if cfg.adapter.kind is AdapterKind.lora:
        add_adapters(hf_model, cfg.adapter)
    counts = count_parameters(hf_model)
    groups = parameter_groups(
        hf_model, rates, cfg.optim.weight_decay, adapter_learning_rate=cfg.adapter.learning_rate
    )
    attention = choose_attention(
        cfg.machine.attention.value,
        device=rank.device,
        head_dims=head_dims(hf_model),
        dtype=next(hf_model.parameters()).dtype,
    )
    if cfg.machine.activation_checkpointing:
        hf_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    hf_model.to(rank.device)
    num_micro_batches = cfg.step.global_packs // rank.dp_size
    engine = Zero(
        PackedModel(hf_model, attention=attention.name),
        build_optimizer(groups, cfg.optim, rank.device),
        machine=cfg.machine,
        optim=cfg.optim,
        num_micro_batches=num_micro_batches,
        rank=rank,
    )
    assert_rope_float32(hf_model)
    engine.train(True)

    identity = run_identity(cfg, data, counts, rank)
    num_steps = cfg.run.num_steps or data.plan.total_steps(cfg.run.num_epochs)
    cursor = Cursor()
    bad_samples = BadSampleLimit(max_fraction=cfg.data.max_bad_fraction)
    if checkpoint is not None:
        resume = refuse_other_identity(checkpoint, identity)
        load_checkpoint(checkpoint, engine=engine, rank=rank)
        cursor = Cursor(**resume["cursor"])
        bad_samples.seen, bad_samples.bad = resume["bad_samples"]["seen"], resume["bad_samples"]["bad"]
    if rank.is_first:
        truncate_metrics(folder / "metrics.jsonl", cursor.step)
        save_config(cfg, folder / "config.yaml")

    console.start(first_step=cursor.step, total_steps=num_steps)
    for part, (trained, total) in counts.items():
        rate = f"rate {rates[part]:g}" if trained else "frozen"
        console.message(f"{part}: {trained:,} of {total:,} parameters trained, {rate}")
    console.message(f"attention: {attention.name} ({attention.reason})")
    console.message(
        f"{num_steps} steps of {cfg.step.global_packs} packs on {rank.dp_size} ranks"
        + (f", resumed after step {cursor.step} from {checkpoint}" if checkpoint else "")
    )
    tracker = Tracker(cfg.tracking, folder, as_plain(cfg), enabled=rank.is_first, step=cursor.step)

    def write_weights(partial: Path) -> None:
        state = base_state_dict(engine.full_state_dict(hf_model))
        if rank.is_first:
            from transformers import AutoProcessor

            save_weights(hf_model, AutoProcessor.from_pretrained(processor_dir), partial / "weights", state_dict=state)
        if cfg.adapter.kind is AdapterKind.lora:
            adapter_state = engine.full_state_dict(hf_model)
            if rank.is_first:
                save_adapter(hf_model, partial / "adapter", state_dict=adapter_state)

    return Run(
        cfg=cfg,
        rank=rank,
        folder=folder,
        data=data,
        held_out=held_out,
        engine=engine,
        num_steps=num_steps,
        cursor=cursor,
        identity=identity,
        write_weights=write_weights,
        console=console,
        tracker=tracker,
        bad_samples=bad_samples,
        source_names=data.source_names,
    )


def seed_everything(seed: int) -> None:
    """One seed for every generator; the data's order does not use them (data/order.py has its own)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def write_processor(cfg: TrainConfig, folder: Path, rank: Rank) -> Path:
    """The run's processor (tokenizer, pixel budgets, chat template) in ``<output_dir>/processor``."""
    target = folder / "processor"
    problem = None
    if rank.is_first and not (target / "tokenizer.json").exists():
        tokenizer_from = cfg.model.tokenizer_from or cfg.model.language_model_from
        if cfg.stage.init_from is not None and cfg.model.tokenizer_from is None:
            tokenizer_from = str(resolve_weights(cfg.stage.init_from))
        assert tokenizer_from is not None, "config rules refuse a run without a tokenizer"
        try:
            build_processor(
                tokenizer_from,
                data=cfg.data,
                image_merge_size=cfg.stage.image_merge_size,
                video_merge_size=cfg.stage.video_merge_size,
                prune_frames=cfg.stage.prune_frames,
            ).save_pretrained(target)
        except (OSError, ValueError) as error:
            problem = f"the tokenizer could not be read from {tokenizer_from}: {error}"
    rank.agree(problem)
    return target


def open_both(
    cfg: TrainConfig, processor_dir: Path, rank: Rank, console: Console
) -> tuple[OpenData, OpenData | None]:
    """Training and held-out data. Rank 0 makes a missing index, then all read it."""
    wants_held_out = cfg.run.evaluate_at_start or cfg.run.evaluate_at_end or cfg.run.evaluate_steps > 0
    problem = None
    if rank.is_first:
        try:
            open_data(cfg, tokenizer_dir=processor_dir, held_out=False, build=True, progress=console.progress)
            if wants_held_out:
                open_data(cfg, tokenizer_dir=processor_dir, held_out=True, build=True, progress=console.progress)
        except (OSError, ValueError) as error:
            problem = str(error)
    rank.agree(problem)
    data = open_data(cfg, tokenizer_dir=processor_dir, held_out=False, build=False)
    held_out = None
    if wants_held_out:
        held_out = open_data(cfg, tokenizer_dir=processor_dir, held_out=True, build=False)
    return data, held_out


def build_model(cfg: TrainConfig, checkpoint: Path | None, rank: Rank, processor_dir: Path) -> Any:
    """The transformers model: from the checkpoint to resume, the stage before, or the published parts."""
    dtype = torch.bfloat16 if cfg.machine.dtype is Dtype.bfloat16 else torch.float32
    if checkpoint is not None:
        return load_model(checkpoint / "weights", dtype=dtype)
    if cfg.stage.init_from is not None:
        return load_model(resolve_weights(cfg.stage.init_from), dtype=dtype)
    assert cfg.model.vision_encoder_from and cfg.model.language_model_from, "config rules refuse this"
    return init_from_parts(
        cfg.model.vision_encoder_from,
        cfg.model.language_model_from,
        processor_dir=processor_dir,
        initializer_range=cfg.model.initializer_range,
        seed=cfg.run.seed,
        dtype=dtype,
    )


def head_dims(hf_model: Any) -> tuple[int, int]:
    """Size of a head in the encoder and in the language model."""
    vision, text = hf_model.config.vision_config, hf_model.config.text_config
    text_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return vision.hidden_size // vision.num_attention_heads, text_dim


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
        },
    }
