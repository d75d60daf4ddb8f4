"""Masters in two halves keep every bit, and are updated as float32 masters are."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from vl3train.config.optim_options import OptimConfig
from vl3train.engine.optim import offload_adamw
from vl3train.engine.optim.build import build_optimizer
from vl3train.engine.optim.split_masters import LOW_BITS, join, split
from vl3train.engine.optim.stochastic_adamw import MOMENTS
from vl3train.engine.ranks import RunError

CPU = torch.device("cpu")
SIZES = (1000, 37, 256)


def floats(bits):
    """float32 values of these 32 bits each."""
    return torch.as_tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def bits_of(values):
    return values.view(torch.int32)


def rounded(masters):
    """To the nearest bfloat16, ties away from zero, in the arithmetic of whole numbers."""
    return (
        (((bits_of(masters.detach()).long() + 0x8000) >> 16) << 16)
        .to(torch.int32)
        .view(torch.float32)
        .bfloat16()
    )


def halves_of(masters):
    weight, low = (
        torch.empty_like(masters, dtype=torch.bfloat16),
        torch.empty_like(masters, dtype=torch.int16),
    )
    split(masters, weight, low)
    return weight, low


UPPER = torch.arange(2**16)  # all signs and exponents, denormals and infinity too
LOWER = {"none": 0, "least": 1, "below a tie": 0x7FFF, "tie": 0x8000, "above a tie": 0x8001, "all": 0xFFFF}


@pytest.mark.parametrize("lower", [*LOWER.values(), None], ids=[*LOWER, "random"])
def test_masters_come_back_to_the_bit_and_weights_are_the_nearest(lower):
    low_bits = torch.randint(2**16, UPPER.shape, generator=torch.Generator().manual_seed(0))
    masters = floats((UPPER << 16) | (low_bits if lower is None else lower))
    masters = masters[~masters.isnan()]
    weight, low = halves_of(masters)
    assert torch.equal(bits_of(join(weight, low)), bits_of(masters))
    assert torch.equal(weight.view(torch.int16), rounded(masters).view(torch.int16))
    tie = (bits_of(masters) & 0xFFFF) == 0x8000
    assert torch.equal(weight[~tie].view(torch.int16), masters[~tie].bfloat16().view(torch.int16))
    for values in (slice(0, 77), slice(3, 40), slice(5000, None)):  # as chunks of a parameter are
        joined, recomputed_low = torch.zeros_like(weight), torch.zeros_like(low)
        split(masters[values], joined[values], recomputed_low[values])
        assert torch.equal(joined[values].view(torch.int16), weight[values].view(torch.int16))
        assert torch.equal(bits_of(join(joined[values], recomputed_low[values])), bits_of(masters[values]))
        assert joined.count_nonzero() <= len(masters[values]), "nothing beside it is written"


@pytest.mark.parametrize(
    ("master", "weight"),
    [
        (0x00000000, 0.0),
        (0x80000000, -0.0),
        (0x3F80FFFF, 1.0078125),
        (0x3FFF8000, 2.0),  # a tie that carries into the exponent
        (0x007F8000, 2.0**-126),  # and one from what is denormal
        (0x00008000, 2.0**-133),  # the least weight there is
        (0x7F7F7FFF, 2.0**127 * (2 - 2.0**-7)),
        (0x7F7FFFFF, float("inf")),  # the largest finite
        (0xFF7FFFFF, -float("inf")),
    ],
)
def test_edges(master, weight):
    found, low = halves_of(floats([master]))
    assert found.item() == weight
    assert found.signbit().item() == (master >> 31)
    assert bits_of(join(found, low)).item() == bits_of(floats([master])).item()


def test_what_is_no_number_stays_none():
    """0x7FFFFFFF is what a GPU writes."""
    masters = floats([0x7F800001, 0x7FBF8000, 0x7FC00000, 0x7FFF8000, 0x7FFFFFFF, 0xFFFF8000, 0xFFFFFFFF])
    weight, low = halves_of(masters)
    assert weight.isnan().all()
    assert join(weight, low).isnan().all()


def check_kernels(device):
    """The kernels against the formulas, bit for bit, for chunks of a buffer that begin anywhere."""
    from vl3train.model.kernels.triton_split import join_bits, split_bits

    random = torch.randint(2**16, UPPER.shape, generator=torch.Generator().manual_seed(0))
    masters = floats((UPPER << 16) | random)
    masters[-3:] = floats([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001])
    weight, low = halves_of(masters)
    bits = bits_of(masters).to(device)
    for values in (slice(0, None), slice(0, 4096), slice(2048, 2049), slice(37, 5000)):
        found_weight, found_low = (
            torch.zeros_like(half, dtype=torch.int16).to(device) for half in (weight, low)
        )
        split_bits(bits[values], found_weight[values], found_low[values])
        joined = torch.zeros_like(bits)
        join_bits(found_weight[values], found_low[values], joined[values])
        assert torch.equal(found_weight[values].cpu(), weight[values].view(torch.int16))
        assert torch.equal(found_low[values].cpu(), low[values])
        assert torch.equal(joined[values].cpu(), bits_of(join(weight[values], low[values])))
        for found in (found_weight, found_low, joined):
            rest = found.cpu()
            rest[values] = 0
            assert not rest.any(), "nothing beside it is written"


def test_kernels_interpreted_are_the_formulas():
    """In a process of its own: triton reads the variable when it is imported."""
    pytest.importorskip("triton", reason="triton comes with torch for CUDA")
    code = "from tests.engine.optim.test_split_masters import check_kernels; check_kernels('cpu')"
    environment = dict(os.environ, TRITON_INTERPRET="1")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_on_a_gpu_are_the_formulas():
    check_kernels("cuda")


def optimizer_of(masters, *, is_split, device=CPU):
    """Two groups, with other rates and decays. Parameters are as engine/zero/zero1_bf16.py leaves them."""
    parameters = [nn.Parameter(master.clone()) for master in masters]
    groups = [
        {"name": "first", "params": parameters[:2], "lr": 0.01, "weight_decay": 0.1},
        {"name": "second", "params": parameters[2:], "lr": 0.003, "weight_decay": 0.0},
    ]
    optimizer = build_optimizer(groups, OptimConfig(), device, offload_optimizer=is_split)
    for parameter in parameters if is_split else ():
        weight = torch.empty_like(parameter, dtype=torch.bfloat16, requires_grad=False)
        optimizer.keep_low_bits(parameter, weight)
        parameter.data, parameter.grad_dtype = weight, torch.float32
    return parameters, optimizer


def start(device=CPU, sizes=SIZES):
    torch.manual_seed(0)
    return [torch.randn(size, device=device) for size in sizes]


def go_on(parameters, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] / (1 + step)
        optimizer.step()


@torch.no_grad()
def assert_same(parameters, optimizer, masters, wanted):
    for parameter, master in zip(parameters, masters, strict=True):
        state = optimizer.state[parameter]
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(join(parameter, state[LOW_BITS]), master)
        assert torch.equal(parameter, rounded(master))
        for name in ("step", *MOMENTS):
            assert torch.equal(state[name], wanted.state[master][name].to(state[name].device)), name


@pytest.mark.parametrize("chunk", [7, 300, 10**9])
def test_masters_weights_and_moments_are_those_of_float32_masters(monkeypatch, chunk):
    monkeypatch.setattr(offload_adamw, "CHUNK_VALUES", chunk)
    ours, torchs = optimizer_of(start(), is_split=True), optimizer_of(start(), is_split=False)
    for step in range(5):
        go_on(*ours, [step])
        go_on(*torchs, [step])
        assert_same(*ours, *torchs)
    assert ours[1].num_bytes() == 8 * sum(SIZES)


def test_a_state_is_loaded_with_its_low_bits(monkeypatch):
    monkeypatch.setattr(offload_adamw, "CHUNK_VALUES", 100)
    torchs = optimizer_of(start(), is_split=False)
    go_on(*torchs, range(5))
    for stop in (0, 3):
        parameters, optimizer = optimizer_of(start(), is_split=True)
        go_on(parameters, optimizer, range(stop))
        saved = copy.deepcopy(optimizer.state_dict())
        weights = [parameter.detach().clone() for parameter in parameters]
        others = optimizer_of([torch.zeros(size) for size in SIZES], is_split=True)
        place = others[1].state[others[0][0]][LOW_BITS].data_ptr()
        for _ in range(2):  # into a new optimizer, and over what it has
            others[1].load_state_dict(copy.deepcopy(saved))
            for other, weight in zip(others[0], weights, strict=True):
                other.data.copy_(weight)
            go_on(*others, range(stop, 5))
            assert_same(*others, *torchs)
        assert others[1].state[others[0][0]][LOW_BITS].data_ptr() == place


def test_a_state_without_low_bits_is_refused_and_nothing_is_changed():
    parameters, optimizer = optimizer_of(start(), is_split=True)
    whole = build_optimizer([{"params": start(), "lr": 1.0}], OptimConfig(), CPU, offload_optimizer=True)
    go_on(parameters, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RunError, match=r"optim\.master_dtype"):
        optimizer.load_state_dict(whole.state_dict() | {"param_groups": before["param_groups"]})
    after = optimizer.state_dict()["state"]
    for number, state in before["state"].items():
        assert all(torch.equal(after[number][name], value) for name, value in state.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_masters_are_those_of_torchs_fused_adamw_and_one_chunk_is_whole_at_a_time(monkeypatch):
    chunk = 2**20
    monkeypatch.setattr(offload_adamw, "CHUNK_VALUES", chunk)
    device = torch.device("cuda", 0)
    masters = start(device, (9 * chunk + 12345, 7, 3 * chunk))
    ours = optimizer_of(masters, is_split=True, device=device)
    torchs = optimizer_of(masters, is_split=False, device=device)
    for step in range(4):
        go_on(*ours, [step])
        go_on(*torchs, [step])
        ours[1].wait()
        assert_same(*ours, *torchs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours[1].step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Means of three chunks, and one chunk's masters.
    assert torch.cuda.max_memory_allocated(device) - held <= (3 * 8 + 4) * chunk + 2**20
