"""Steps, trained parameters, memory and time of a fine-tuning, before it starts."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vl3train.config.choices import AdapterKind
from vl3train.config.problems import counted
from vl3train.config.rules import adapter_rates, full_rates
from vl3train.config.schema import PARTS, TrainConfig
from vl3train.contracts.gpus import GPUS, Gpu
from vl3train.data.pipeline import OpenData
from vl3train.model.adapter_targets import adapter_sizes
from vl3train.preview.plan_estimate import UTILISATION, ModelSizes, estimate, rank_memory
from vl3train.preview.plan_figures import PlanFigures

WANTED_STEPS, FEW_STEPS = 100, 50
MOST_SAMPLES = 16
"""Of one step. Peers' recipes take 8 to 16: LLaMA-Factory 8, unsloth 8, ms-swift 16 (their examples of LoRA)."""
EVALUATIONS_IN_EPOCH, MOST_EVALUATIONS = 2, 10
MOST_UNSAVED_STEPS = 500
CPU_UTILISATION = 0.3
"""Of the rate of a matrix product: 0.2 to 0.4 were seen with models of 1 to 135 million parameters on two cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What trains: so many GPUs of a kind, or a CPU whose rate was measured."""

    ranks: int
    name: str
    gpu: Gpu | None  # None for a GPU of no data sheet that we have
    utilisation: float


def this_machine() -> Machine:
    """The GPUs of this machine; without one, its CPU, with the rate of a float32 matrix product."""
    import torch

    if count := torch.cuda.device_count():
        name = torch.cuda.get_device_name(0)
        known = next((gpu for word, gpu in GPUS.items() if word in name.lower()), None)
        return Machine(ranks=count, name=name, gpu=known, utilisation=UTILISATION)
    rows = torch.ones(384, 384)
    rows @ rows
    started, times = time.perf_counter(), 20
    for _ in range(times):
        rows @ rows
    rate = 2 * 384**3 * times / (time.perf_counter() - started)
    return Machine(ranks=1, name="CPU", gpu=Gpu(rate / 1e12, 0), utilisation=CPU_UTILISATION)


def samples_a_step(num_samples: int, epochs: float, ranks: int) -> int:
    """Most samples of a step, so that a small set makes at least WANTED_STEPS; a sample for each rank at least.

    >>> samples_a_step(259, 3, 1), samples_a_step(40, 3, 2), samples_a_step(10_000, 3, 1)
    (7, 2, 16)
    """
    return max(ranks, min(MOST_SAMPLES, int(num_samples * epochs / WANTED_STEPS)), 1)


def step_options(cfg: TrainConfig, num_samples: int, typed: set[str]) -> dict[str, Any]:
    """``step.global_packs`` and ``step.max_samples``, unless the person wrote them."""
    ranks = cfg.machine.dp_size
    found = {
        "step.global_packs": ranks,
        "step.max_samples": samples_a_step(num_samples, cfg.run.num_epochs, ranks),
    }
    return {key: value for key, value in found.items() if key not in typed}


def save_options(cfg: TrainConfig, num_steps: int, evaluates: bool, typed: set[str]) -> dict[str, Any]:
    """When to evaluate and to save: EVALUATIONS_IN_EPOCH times an epoch, MOST_EVALUATIONS times in all; the checkpoint
    with the least loss is kept. A run that is killed loses MOST_UNSAVED_STEPS at most."""
    times = min(MOST_EVALUATIONS, max(1, round(EVALUATIONS_IN_EPOCH * cfg.run.num_epochs)))
    every = math.ceil(num_steps / times)
    found: dict[str, Any] = {"run.save_steps": min(every, MOST_UNSAVED_STEPS)}
    if evaluates:
        found |= {"run.evaluate_steps": every, "run.best_figure": "loss"}
    return {key: value for key, value in found.items() if key not in typed}


def trained_parameters(cfg: TrainConfig, sizes: ModelSizes) -> dict[str, tuple[int, int]]:
    """Trained parameters and all of the weights, of each part. Adapters are counted as trained only."""
    full = full_rates(cfg)
    adapters: dict[str, int] = {}
    if cfg.adapter.kind is AdapterKind.lora:
        towers = {"language_model": sizes.language, "vision_encoder": sizes.encoder}
        adapters = adapter_sizes(cfg.adapter, towers)
        # Heads and embeddings that are not one tensor may train in full beside adapters.
        head = sizes.language.vocab_size * sizes.language.hidden_size
        beside = head * len({"lm_head", "embed_tokens"} & set(cfg.adapter.modules_to_save))
        adapters["language_model"] = adapters.get("language_model", 0) + beside
    return {
        part: (
            sizes.num_parameters[part] if part in full else adapters.get(part, 0),
            sizes.num_parameters[part],
        )
        for part in PARTS
    }


def plan_lines(
    cfg: TrainConfig,
    figures: PlanFigures,
    sizes: ModelSizes,
    machine: Machine,
    held_out: int,
) -> list[str]:
    """The plan in words, a line each."""
    epoch, steps = figures.epoch, figures.num_steps
    counts = trained_parameters(cfg, sizes)
    a_step = epoch.samples / figures.steps_in_epoch
    trained, total = (sum(count[i] for count in counts.values()) for i in (0, 1))
    kinds = ", ".join(f"{group.samples:,} {group.name}" for group in figures.modalities)
    lines = [
        f"samples   {epoch.samples:,} train ({kinds}), {held_out:,} are held out",
        f"steps     {steps:,} in {counted(cfg.run.num_epochs, 'epoch')}, {a_step:.3g} samples a step",
        f"trained   {trained:,} of {total:,} parameters ({trained / max(1, total + trained):.2%}): "
        + (", ".join(_how(cfg, part, counts) for part in PARTS if counts[part][0]) or "nothing"),
    ]
    if machine.gpu is None:
        lines.append(f"time      unknown: no data sheet of {machine.name}")
    else:
        found = estimate(cfg, figures, machine.gpu, machine.utilisation, sizes)
        lines.append(
            f"time      about {duration(found.step_seconds * steps)} on {machine.ranks} x {machine.name}, evaluations "
            "not counted (estimated)"
        )
    lines.append(f"memory    {_memory(cfg, machine, sizes)}")
    if steps < FEW_STEPS:
        lines.append(
            f"WARNING: {steps} steps are few to learn from; train longer (--epochs), with fewer samples a step "
            "(step.max_samples), or on fewer ranks"
        )
    return lines


def _how(cfg: TrainConfig, part: str, counts: Mapping[str, tuple[int, int]]) -> str:
    if (adapted := adapter_rates(cfg)) and part in adapted:
        return f"{part} by adapters of rank {cfg.adapter.rank} at {adapted[part]:g}"
    return f"{part} in full at {full_rates(cfg)[part]:g}"


def _memory(cfg: TrainConfig, machine: Machine, sizes: ModelSizes) -> str:
    """The estimate of `vl3train plan`, by what holds the memory."""
    parts, recompute = rank_memory(cfg, machine.gpu or Gpu(0.0, 0), sizes)
    by_pack = ("activations", "logits")
    if machine.gpu is None:
        parts = {name: size for name, size in parts.items() if name not in by_pack}
    each = ", ".join(f"{name} {size:.3g}" for name, size in parts.items())
    text = f"{sum(parts.values()):.3g} GiB at the peak ({each})"
    if machine.gpu is None:
        return f"{text}; activations come on top"
    if machine.gpu.gigabytes:
        text += f" of {machine.gpu.gigabytes * 1e9 / 2**30:.3g}"
    return f"{text}; recomputed of a full pack: {recompute}" if recompute else f"{text}, estimated"


def duration(seconds: float) -> str:
    """A time that a person can plan with.

    >>> duration(0.2), duration(50), duration(4000), duration(90_000)
    ('a second', '50 seconds', '1.1 hours', '25 hours')
    """
    if seconds < 1.5:
        return "a second"
    if seconds < 90:
        return f"{seconds:.2g} seconds"
    return f"{seconds / 60:.2g} minutes" if seconds < 3600 else f"{seconds / 3600:.2g} hours"


def steps_of(cfg: TrainConfig, data: OpenData) -> int:
    """Steps of the run."""
    return cfg.run.num_steps or data.plan.total_steps(cfg.run.num_epochs)
