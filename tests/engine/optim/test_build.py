"""The rate of a step is a pure function of the step, and every group gets its own."""

from __future__ import annotations

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from vl3train.config.choices import Schedule
from vl3train.config.optim_options import OptimConfig
from vl3train.engine.optim.build import build_optimizer, rate_factor, set_rates


def test_cosine_after_warm_up_is_that_of_transformers():
    optim = OptimConfig(warmup_fraction=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=10, num_training_steps=100)
    wanted = []
    for _ in range(100):
        wanted.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    ours = [rate_factor(step, 100, optim) for step in range(100)]
    assert ours[10:] == pytest.approx(wanted[10:])
    assert ours[:10] == pytest.approx([(step + 1) / 10 for step in range(10)]), (
        "the first step already learns"
    )


def test_constant_stays_and_the_floor_holds():
    constant = OptimConfig(schedule=Schedule.constant, warmup_fraction=0.0)
    assert {rate_factor(step, 50, constant) for step in range(50)} == {1.0}
    floor = OptimConfig(min_lr_fraction=0.1, warmup_fraction=0.0)
    assert min(rate_factor(step, 50, floor) for step in range(50)) >= 0.1


def test_every_group_follows_its_own_peak():
    groups = [
        {"name": "projector", "params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1e-3},
        {"name": "vision_encoder", "params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1e-5},
    ]
    optimizer = build_optimizer(groups, OptimConfig(), torch.device("cpu"))
    assert set_rates(optimizer, 0.5) == {"projector": 5e-4, "vision_encoder": 5e-6}
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 5e-6]
    assert set_rates(optimizer, 1.0) == {"projector": 1e-3, "vision_encoder": 1e-5}
