"""The learning rate of a step, and the optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from vl3train.config.choices import Schedule
from vl3train.config.schema import OptimConfig


def rate_factor(step: int, num_steps: int, optim: OptimConfig) -> float:
    """Share of the peak rate at ``step`` (0-based): linear warm-up, then cosine or constant.

    A pure function of the step, so a resume needs no scheduler state. As transformers'
    ``get_cosine_schedule_with_warmup``, but the first step already learns.

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
    groups: Sequence[dict[str, Any]], optim: OptimConfig, device: torch.device
) -> torch.optim.AdamW:
    """AdamW over one group for each part; the kernel is fused on GPUs.

    Each group keeps its peak rate as ``peak_lr``, from which ``set_rates`` makes every step's rate.
    """
    for group in groups:
        group["peak_lr"] = group["lr"]
    return torch.optim.AdamW(
        list(groups), betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=device.type == "cuda"
    )


def set_rates(optimizer: Any, factor: float) -> dict[str, float]:
    """Set every group's rate to its peak times ``factor``; returns the rate of each group."""
    rates = {}
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
        rates[group["name"]] = group["lr"]
    return rates
