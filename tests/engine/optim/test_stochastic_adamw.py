"""AdamW with bfloat16 means does what torch's does, and loses no small change."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from vl3train.config.choices import Dtype
from vl3train.config.optim_options import OptimConfig
from vl3train.config.schema import MachineConfig
from vl3train.engine.optim.build import build_optimizer, optimizer_cost
from vl3train.engine.optim.stochastic_adamw import MOMENTS, StochasticAdamW, round_stochastically

CPU = torch.device("cpu")


def optimizer_of(parameter, state_dtype, weight_decay=0.1, lr=0.01):
    groups = [{"name": "projector", "params": [parameter], "lr": lr, "weight_decay": weight_decay}]
    return build_optimizer(groups, OptimConfig(state_dtype=state_dtype), CPU)


def test_the_first_step_is_torchs():
    """Nothing was rounded yet."""
    torch.manual_seed(0)
    ours, torchs = (nn.Parameter(torch.linspace(-1, 1, 999)) for _ in range(2))
    gradient = torch.randn(999)
    for parameter, state_dtype in ((ours, Dtype.bfloat16), (torchs, Dtype.float32)):
        parameter.grad = gradient.clone()
        optimizer_of(parameter, state_dtype).step()
    torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=1e-7)


def test_after_many_steps_it_is_where_torchs_is():
    """Noisy gradients of a bowl; both stand equally near to its floor, and near to each other."""
    places = {}
    for state_dtype in Dtype:
        torch.manual_seed(1)
        parameter = nn.Parameter(torch.full((2000,), 3.0))
        optimizer = optimizer_of(parameter, state_dtype, weight_decay=0.0)
        for _ in range(600):
            noise = torch.randn(
                2000, generator=torch.Generator().manual_seed(int(optimizer_steps(optimizer)))
            )
            parameter.grad = parameter.detach() + 0.3 * noise
            optimizer.step()
        places[state_dtype] = parameter.detach()
    ours, torchs = places[Dtype.bfloat16], places[Dtype.float32]
    assert ours.square().mean() == pytest.approx(torchs.square().mean().item(), rel=0.05)
    assert (ours - torchs).abs().mean() < 0.1 * torchs.abs().mean()


def optimizer_steps(optimizer):
    return next((state["step"] for state in optimizer.state.values()), 0)


def test_the_mean_of_squares_does_not_stand_still():
    """Its steps are a thousandth: to the nearest bfloat16 they would end at half of what they should reach."""
    torch.manual_seed(2)
    parameter = nn.Parameter(torch.zeros(4000))
    optimizer = optimizer_of(parameter, Dtype.bfloat16)
    nearest = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(2000):
        parameter.grad = torch.ones(4000)
        optimizer.step()
        nearest = (nearest.float() * 0.999 + 0.001).to(torch.bfloat16)
    wanted = 1 - 0.999**2000
    kept = optimizer.state[parameter]["exp_avg_sq"]
    assert kept.dtype == torch.bfloat16
    assert kept.float().mean() == pytest.approx(wanted, rel=0.005)
    assert nearest < 0.7 * wanted


def test_rounding_is_right_on_average_and_never_beyond_the_neighbours():
    torch.manual_seed(3)
    values = torch.tensor([1.0, -1.0, 0.0, 1.001, -3.1416, 1e-30, 2.5e8, 1 + 2**-8])
    rounded = round_stochastically(values.expand(20_000, -1).contiguous()).float()
    below, above = (torch.floor if sign < 0 else torch.ceil for sign in (-1, 1))
    step = 2.0 ** (torch.floor(torch.log2(values.abs().clamp(min=1e-38))) - 7)
    assert torch.all(rounded >= below(values / step) * step)
    assert torch.all(rounded <= above(values / step) * step)
    torch.testing.assert_close(rounded.mean(0), values, rtol=2e-4, atol=0)
    assert torch.equal(rounded[:, :3], values[:3].expand(20_000, -1)), "what bfloat16 holds stays"


def test_states_are_saved_and_come_back_in_bfloat16():
    torch.manual_seed(4)
    parameter = nn.Parameter(torch.randn(500))
    optimizer = optimizer_of(parameter, Dtype.bfloat16)

    def go_on(parameter, optimizer, steps):
        for _ in range(steps):
            parameter.grad = parameter.detach() * 2
            optimizer.step()

    go_on(parameter, optimizer, 5)
    resumed = nn.Parameter(parameter.detach().clone())
    restored = optimizer_of(resumed, Dtype.bfloat16)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {restored.state[resumed][name].dtype for name in MOMENTS} == {torch.bfloat16}
    random = torch.get_rng_state()
    go_on(parameter, optimizer, 5)
    torch.set_rng_state(random)
    go_on(resumed, restored, 5)
    assert torch.equal(resumed, parameter)


def test_compiled_it_is_the_same_arithmetic(monkeypatch):
    """As on a GPU, but for the kernels; one program for all steps and sizes."""
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    results = []
    for compile_update in (True, False):
        parameters = [nn.Parameter(torch.linspace(-1, 1, size)) for size in (700, 30, 512)]
        groups = [{"params": parameters, "lr": 0.01, "weight_decay": 0.1}]
        optimizer = StochasticAdamW(groups, betas=(0.9, 0.999), eps=1e-8, compile_update=compile_update)
        for _ in range(3):
            torch.manual_seed(5)
            for parameter in parameters:
                parameter.grad = torch.sin(parameter.detach() * 9)
            optimizer.step()
        results.append(torch.cat([parameter.detach() for parameter in parameters]))
    torch.testing.assert_close(*results, rtol=2e-3, atol=2e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_cost_is_told():
    machine = MachineConfig(dp_size=4)
    assert optimizer_cost(2**31, OptimConfig(state_dtype=Dtype.bfloat16), machine) == (
        "optimizer: 2.0 GiB for AdamW's moments in bfloat16 and 2.0 GiB for float32 master weights on each of 4 ranks"
    )
    alone = MachineConfig(zero_stage=0, dtype=Dtype.float32)
    assert optimizer_cost(2**30, OptimConfig(), alone) == (
        "optimizer: 8.0 GiB for AdamW's moments in float32 and none for master weights on each of 1 rank"
    )


def test_weights_without_masters_move_by_less_than_they_can_show():
    """Steps of a hundredth of what bfloat16 can show at 1, all in one direction: on average the weights follow."""
    torch.manual_seed(6)
    parameter = nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    parameter.grad_dtype = torch.float32
    optimizer = optimizer_of(parameter, Dtype.bfloat16, weight_decay=0.0, lr=2**-7 / 100)
    for _ in range(150):
        parameter.grad = torch.ones(4000)
        optimizer.step()
    assert parameter.dtype == torch.bfloat16
    assert 1 - parameter.detach().float().mean() == pytest.approx(150 * 2**-7 / 100, rel=0.05)
