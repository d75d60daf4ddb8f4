"""The learning rate of a step, and the optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from vl3train.config.choices import Dtype, MasterDtype, Schedule
from vl3train.config.optim_options import OptimConfig
from vl3train.config.problems import counted
from vl3train.config.schema import MachineConfig
from vl3train.engine.optim.offload_adamw import OffloadAdamW
from vl3train.engine.optim.skipping_adamw import SkippingAdamW
from vl3train.engine.optim.stochastic_adamw import StochasticAdamW


def rate_factor(step: int, num_steps: int, optim: OptimConfig) -> float:
    """Share of the peak rate at ``step`` (0-based): linear warm-up, then cosine or constant.

    A pure function of the step, so a resume needs no scheduler state. The same as transformers'
    ``get_cosine_schedule_with_warmup``, except that the first step already has a rate above zero.

    >>> [round(rate_factor(step, 10, OptimConfig(warmup_fraction=0.2)), 3) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.038]
    """
    warmup = math.ceil(num_steps * optim.warmup_fraction)
    if step < warmup:
        return (step + 1) / warmup
    if optim.schedule is Schedule.constant:
        return 1.0
    progress = (step - warmup) / max(1, num_steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return optim.min_lr_fraction + (1 - optim.min_lr_fraction) * cosine


def build_optimizer(
    groups: Sequence[dict[str, Any]],
    optim: OptimConfig,
    device: torch.device,
    *,
    offload_optimizer: bool = False,
) -> SkippingAdamW | StochasticAdamW:
    """AdamW over one group for each part; the kernel is fused on GPUs.

    Each group keeps its peak rate as ``peak_lr``; ``set_rates`` computes every step's rate from it.
    """
    for group in groups:
        group["peak_lr"] = group["lr"]
    betas, on_gpu = (optim.beta1, optim.beta2), device.type == "cuda"
    if optim.state_dtype is Dtype.bfloat16:
        return StochasticAdamW(groups, betas=betas, eps=optim.eps, compile_update=on_gpu)
    if offload_optimizer:
        return OffloadAdamW(groups, betas=betas, eps=optim.eps, fused=on_gpu)
    return SkippingAdamW(list(groups), betas=betas, eps=optim.eps, fused=on_gpu)


def optimizer_cost(num_trained: int, optim: OptimConfig, machine: MachineConfig) -> str:
    """The memory that AdamW's moments and master weights take on each rank, as one line.

    >>> optimizer_cost(2**30, OptimConfig(), MachineConfig(dp_size=2))
    "optimizer: 4.0 GiB for AdamW's moments in float32 and 2.0 GiB for float32 master weights on each of 2 ranks"
    """
    ranks = machine.dp_size if machine.zero_stage else 1
    states, masters = (
        size * num_trained / ranks / 2**30 for size in (state_bytes(optim), master_bytes(optim, machine))
    )
    half = "the lower half of " if optim.master_dtype is MasterDtype.split else ""
    kept = f"{masters:.1f} GiB for {half}float32 master weights" if masters else "none for master weights"
    where = " in host memory" if machine.offload_optimizer else ""
    return (
        f"optimizer: {states:.1f} GiB for AdamW's moments in {optim.state_dtype.value}{where} and {kept} "
        f"on each of {counted(machine.dp_size, 'rank')}"
    )


def state_bytes(optim: OptimConfig) -> int:
    """Bytes of AdamW's two moments for each trained parameter."""
    return 4 if optim.state_dtype is Dtype.bfloat16 else 8


def master_bytes(optim: OptimConfig, machine: MachineConfig) -> int:
    """Bytes of the master weight for each trained parameter, beside the weight that the model computes with."""
    if machine.dtype is Dtype.float32:
        return 0
    return {MasterDtype.float32: 4, MasterDtype.split: 2, MasterDtype.bfloat16: 0}[optim.master_dtype]


def set_rates(optimizer: Any, factor: float) -> dict[str, float]:
    """Set every group's rate to its peak rate times ``factor``; returns the rate of each group by name."""
    rates = {}
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
        rates[group["name"]] = group["lr"]
    return rates
