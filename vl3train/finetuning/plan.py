"""Steps, trained parameters, memory and time of a fine-tuning, before it starts."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vl3train.config.choices import AdapterKind, Dtype
from vl3train.config.rules import adapter_rates, full_rates
from vl3train.config.schema import PARTS, TrainConfig
from vl3train.contracts.gpus import GPUS, Gpu
from vl3train.data.pipeline import OpenData
from vl3train.engine.optim.build import master_bytes, state_bytes
from vl3train.preview.plan_estimate import UTILISATION, estimate
from vl3train.preview.plan_figures import PlanFigures

WANTED_STEPS, FEW_STEPS = 100, 50
MOST_SAMPLES = 16
"""Of one step. Peers' recipes take 8 to 16: LLaMA-Factory 8, unsloth 8, ms-swift 16 (their examples of LoRA)."""
EVALUATIONS_IN_EPOCH, MOST_EVALUATIONS = 2, 10
MOST_UNSAVED_STEPS = 500
CPU_UTILISATION = 0.3
"""Of the rate of a matrix product: 0.2 to 0.4 were seen with models of 1 to 135 million parameters on two cores."""

LAYERS = {
    "language_model": r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight",
    "vision_encoder": r"model\.vision_model\.encoder\.layers\.\d+\.(self_attn\.\w+_proj|mlp\.fc[12])\.weight",
}
"""Weights that get adapters."""
OF_PART: dict[str, tuple[str, ...]] = {
    "vision_encoder": ("model.vision_model.",),
    "projector": ("model.projector.",),
    "language_model": ("model.language_model.", "lm_head."),
}


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


def trained_parameters(cfg: TrainConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Trained parameters and all of the weights, of each part. Adapters are counted as trained only."""
    adapted, full = adapter_rates(cfg), full_rates(cfg)
    found = {}
    for part in PARTS:
        sizes = {name: shape for name, shape in shapes.items() if name.startswith(OF_PART[part])}
        total = sum(int(np.prod(shape)) for shape in sizes.values())
        trained = total if part in full else 0
        if part in adapted:
            layers = [shape for name, shape in sizes.items() if re.fullmatch(LAYERS[part], name)]
            rank = cfg.adapter.part_ranks.get(part, cfg.adapter.rank)
            trained = rank * sum(rows + columns for rows, columns in layers)
        found[part] = (trained, total)
    return found


def plan_lines(
    cfg: TrainConfig,
    figures: PlanFigures,
    counts: Mapping[str, tuple[int, int]],
    machine: Machine,
    held_out: int,
) -> list[str]:
    """The plan in words, a line each."""
    epoch, steps = figures.epoch, figures.num_steps
    a_step = epoch.samples / figures.steps_in_epoch
    trained, total = (sum(count[i] for count in counts.values()) for i in (0, 1))
    kinds = ", ".join(f"{group.samples:,} {group.name}" for group in figures.modalities)
    lines = [
        f"samples   {epoch.samples:,} train ({kinds}), {held_out:,} are held out",
        f"steps     {steps:,} in {cfg.run.num_epochs:g} epochs, {a_step:.3g} samples a step",
        f"trained   {trained:,} of {total:,} parameters ({trained / max(1, total + trained):.2%}): "
        + (", ".join(_how(cfg, part, counts) for part in PARTS if counts[part][0]) or "nothing"),
    ]
    if machine.gpu is None:
        lines.append(f"time      unknown: no data sheet of {machine.name}")
    else:
        found = estimate(cfg, figures, machine.gpu, machine.utilisation)
        lines.append(
            f"time      about {duration(found.step_seconds * steps)} on {machine.ranks} x {machine.name}, evaluations "
            "not counted (estimated)"
        )
    lines.append(f"memory    {_memory(cfg, trained, total)}")
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


def _memory(cfg: TrainConfig, trained: int, total: int) -> str:
    """Of what does not depend on the packs; activations come on top."""
    width = 2 if cfg.machine.dtype is Dtype.bfloat16 else 4
    weights = total + (trained if cfg.adapter.kind is not AdapterKind.none else 0)
    size = weights * width + trained * (4 + master_bytes(cfg.optim, cfg.machine) + state_bytes(cfg.optim))
    fits = "machine.memory=auto fits them to the GPU" if cfg.machine.memory.value == "auto" else "come on top"
    return f"{size / 2**30:.2f} GiB of weights, gradients and optimizer; activations: {fits}"


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
