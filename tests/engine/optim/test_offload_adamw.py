"""AdamW with its moments on the host does, to the bit, what torch's does."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn

from vl3train.config.choices import MasterDtype
from vl3train.config.optim_options import OptimConfig
from vl3train.config.schema import MachineConfig
from vl3train.engine.optim import offload_adamw, offload_chunk
from vl3train.engine.optim.build import build_optimizer, optimizer_cost
from vl3train.engine.optim.offload_adamw import OffloadAdamW
from vl3train.engine.optim.stochastic_adamw import MOMENTS

CPU = torch.device("cpu")
SIZES = (1000, 37, 256)
NEVER, LATE = 1, 2  # numbers of the parameters that get no gradient, and none in the first steps


def optimizer_of(parameters, offload_optimizer, device=CPU):
    """Two groups, with other rates and decays."""
    groups = [
        {"name": "first", "params": parameters[:2], "lr": 0.01, "weight_decay": 0.1},
        {"name": "second", "params": parameters[2:], "lr": 0.003, "weight_decay": 0.0},
    ]
    return build_optimizer(groups, OptimConfig(), device, offload_optimizer=offload_optimizer)


def parameters_on(device=CPU):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(size, device=device)) for size in SIZES]


def go_on(parameters, optimizer, steps, before_step=lambda: None):
    """Steps with noisy gradients and a rate that changes."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for number, parameter in enumerate(parameters):
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            absent = number == NEVER or (number == LATE and step < 2)
            parameter.grad = None if absent else parameter.detach() + noise
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] / (1 + step)
        before_step()
        optimizer.step()


def assert_same(parameters, optimizer, others, other_optimizer):
    for parameter, other in zip(parameters, others, strict=True):
        assert torch.equal(parameter, other)
        state, wanted = optimizer.state.get(parameter, {}), other_optimizer.state.get(other, {})
        assert state.keys() == wanted.keys()
        for name in state:
            assert torch.equal(state[name], wanted[name].to(state[name].device)), name


def chunks(optimizer):
    return list(optimizer._all_chunks())


@pytest.mark.parametrize("chunk", [7, 64, 10**9])
@pytest.mark.parametrize("prefetched", [None, 0, 3000, 10**9], ids=lambda size: f"{size} bytes prefetched")
def test_weights_and_moments_are_torchs_to_the_bit(monkeypatch, chunk, prefetched):
    monkeypatch.setattr(offload_adamw, "CHUNK_VALUES", chunk)
    ours, torchs = parameters_on(), parameters_on()
    on_host, on_device = optimizer_of(ours, True), optimizer_of(torchs, False)
    assert isinstance(on_host, OffloadAdamW)
    prefetch = (lambda: None) if prefetched is None else lambda: on_host.prefetch(prefetched)
    go_on(ours, on_host, range(6), prefetch)
    go_on(torchs, on_device, range(6))
    assert_same(ours, on_host, torchs, on_device)
    assert not any(chunk.is_on_device for chunk in chunks(on_host)), "the device's copies are freed"


def test_what_is_prefetched_is_what_is_updated_first_and_fits(monkeypatch):
    monkeypatch.setattr(offload_adamw, "CHUNK_VALUES", 100)
    parameters = parameters_on()
    optimizer = optimizer_of(parameters, True)
    optimizer.prefetch(10**9)  # before the first step there is nothing to fetch
    go_on(parameters, optimizer, range(3))
    there = []
    # Of all moments on the device, whatever was prefetched before; those on the device stay.
    for room, wanted in ((799, 0), (800, 1), (1700, 2), (800, 2), (2399, 2), (2400, 3), (10**9, 13)):
        optimizer.prefetch(room)
        there.append([chunk.is_on_device for chunk in chunks(optimizer)])
        assert there[-1] == [True] * wanted + [False] * (13 - wanted)
    assert sum(chunk.num_bytes for chunk in chunks(optimizer)) == 8 * (SIZES[0] + SIZES[2])
    assert optimizer.num_bytes() == 8 * sum(SIZES)


def test_what_was_prefetched_for_a_parameter_without_gradient_is_freed(monkeypatch):
    monkeypatch.setattr(offload_adamw, "CHUNK_VALUES", 100)
    parameters = parameters_on()
    optimizer = optimizer_of(parameters, True)
    go_on(parameters, optimizer, range(3))
    before = parameters[0].detach().clone(), copy.deepcopy(optimizer.state[parameters[0]])
    optimizer.prefetch(10**9)
    parameters[0].grad = None
    optimizer.step()
    assert not any(chunk.is_on_device for chunk in chunks(optimizer))
    assert torch.equal(parameters[0], before[0])
    assert all(torch.equal(optimizer.state[parameters[0]][name], value) for name, value in before[1].items())


def test_a_step_takes_no_more_memory_than_what_was_prefetched_and_three_chunks(monkeypatch):
    """Nothing that leaves is free yet as far as the host knows, which is ahead of the device."""
    monkeypatch.setattr(offload_adamw, "CHUNK_VALUES", 100)
    parameters = parameters_on()
    optimizer = optimizer_of(parameters, True)
    go_on(parameters, optimizer, range(3))
    made, buffer = [], offload_chunk.DeviceBuffer
    monkeypatch.setattr(
        offload_chunk, "DeviceBuffer", lambda moments: made.append(moments) or buffer(moments)
    )
    for prefetched, buffers in ((0, 3), (799, 3), (800, 3), (4 * 800, 4), (6 * 800, 6), (10**9, 13)):
        made.clear()
        go_on(
            parameters, optimizer, range(3, 4), lambda prefetched=prefetched: optimizer.prefetch(prefetched)
        )
        assert len(made) == buffers


@pytest.mark.parametrize(("prefetched", "most"), [(0, 3), (4 * 800, 7), (10**9, 13)])
def test_buffers_that_no_fetch_needs_are_freed_at_once(monkeypatch, prefetched, most):
    """torch reuses memory when the work that was queued before it was freed is done."""
    monkeypatch.setattr(offload_adamw, "CHUNK_VALUES", 100)
    parameters = parameters_on()
    optimizer = optimizer_of(parameters, True)
    go_on(parameters, optimizer, range(3))
    made, alive, buffer, update = (
        weakref.WeakSet(),
        [],
        offload_chunk.DeviceBuffer,
        offload_chunk.Chunk.update,
    )

    def counted_buffer(moments):
        made.add(moments[0])
        return buffer(moments)

    def watched(self, *arguments):
        alive.append(len(made))
        update(self, *arguments)

    monkeypatch.setattr(offload_chunk, "DeviceBuffer", counted_buffer)
    monkeypatch.setattr(offload_chunk.Chunk, "update", watched)
    go_on(parameters, optimizer, range(3, 4), lambda: optimizer.prefetch(prefetched))
    assert max(alive) <= most
    assert alive[-1] == 1, "with the last chunk no other buffer is left"
    assert len(made) == 0


def test_a_buffer_too_small_is_not_reused(monkeypatch):
    monkeypatch.setattr(offload_adamw, "CHUNK_VALUES", 100)
    found = []
    for offload_optimizer in (False, True):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(size)) for size in (5, 1, 700)]
        optimizer = optimizer_of(parameters, offload_optimizer)
        go_on([parameters[0], torch.zeros(1), *parameters[1:]], optimizer, range(2, 5))
        found.append(torch.cat([parameter.detach() for parameter in parameters]))
    assert torch.equal(*found)


@pytest.mark.parametrize("saved_on_host", [False, True])
@pytest.mark.parametrize("loaded_on_host", [False, True])
def test_a_state_goes_from_either_optimizer_into_either(monkeypatch, saved_on_host, loaded_on_host):
    monkeypatch.setattr(offload_adamw, "CHUNK_VALUES", 100)
    straight = parameters_on()
    straight_optimizer = optimizer_of(straight, False)
    go_on(straight, straight_optimizer, range(6))

    first = parameters_on()
    first_optimizer = optimizer_of(first, saved_on_host)
    go_on(first, first_optimizer, range(3))
    second = [nn.Parameter(parameter.detach().clone()) for parameter in first]
    second_optimizer = optimizer_of(second, loaded_on_host)
    second_optimizer.load_state_dict(copy.deepcopy(first_optimizer.state_dict()))
    go_on(second, second_optimizer, range(3, 6), lambda: loaded_on_host and second_optimizer.prefetch(2000))
    assert_same(second, second_optimizer, straight, straight_optimizer)
    assert second_optimizer.param_groups[0].keys() == straight_optimizer.param_groups[0].keys()


def test_a_state_is_loaded_into_the_memory_that_is_there():
    parameters = parameters_on()
    optimizer = optimizer_of(parameters, True)
    go_on(parameters, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    places = [optimizer.state[parameters[0]][name].data_ptr() for name in MOMENTS]
    go_on(parameters, optimizer, range(3, 5))
    optimizer.load_state_dict(saved)
    state = optimizer.state[parameters[0]]
    assert [state[name].data_ptr() for name in MOMENTS] == places
    assert all(torch.equal(state[name], saved["state"][0][name]) for name in ("step", *MOMENTS))


def test_the_cost_says_where_the_states_lie():
    assert optimizer_cost(2**30, OptimConfig(), MachineConfig(dp_size=2, offload_optimizer=True)) == (
        "optimizer: 4.0 GiB for AdamW's moments in float32 in host memory and 2.0 GiB for float32 master weights on "
        "each of 2 ranks"
    )
    machine, split = (
        MachineConfig(dp_size=1, offload_optimizer=True),
        OptimConfig(master_dtype=MasterDtype.split),
    )
    assert optimizer_cost(2**30, split, machine).endswith(
        "and 2.0 GiB for the lower half of float32 master weights on each of 1 rank"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("prefetched", [0, 10**9], ids=["none prefetched", "all prefetched"])
def test_on_a_gpu_weights_are_torchs_nothing_stays_and_the_host_never_waits(monkeypatch, prefetched):
    monkeypatch.setattr(offload_adamw, "CHUNK_VALUES", 2**20)
    device, copy_of = torch.device("cuda", 0), offload_chunk._copy

    def slow_copy(sources, targets, stream, after=()):
        """Late, so that whoever does not wait for it reads or writes too early."""
        with torch.cuda.stream(stream):
            torch.cuda._sleep(5_000_000)
        return copy_of(sources, targets, stream, after)

    monkeypatch.setattr(offload_chunk, "_copy", slow_copy)
    torch.manual_seed(0)
    start = [torch.randn(size, device=device) for size in (9 * 2**20 + 12345, 7, 3 * 2**20)]
    gradients = [[torch.randn_like(values) for values in start] for _ in range(4)]
    found = []
    for offload_optimizer in (False, True):
        parameters = [nn.Parameter(values.clone()) for values in start]
        optimizer = optimizer_of(parameters, offload_optimizer, device)
        for step, of_step in enumerate(gradients):
            for parameter, gradient in zip(parameters, of_step, strict=True):
                parameter.grad = gradient
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] / (1 + step)
            held = torch.cuda.memory_allocated(device)
            if offload_optimizer and step:
                torch.cuda.set_sync_debug_mode("error")
            try:
                if offload_optimizer:
                    optimizer.prefetch(prefetched)
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            if offload_optimizer and step == 3:  # until then each step runs into the copies of the one before
                late = [chunk for chunk in chunks(optimizer) if not chunk._left.query()]
                assert late, "the host did not wait"
                optimizer.wait(max_bytes_left=2 * 2**20 * 8)
                assert all(chunk._left.query() for chunk in chunks(optimizer)[:-2])
                optimizer.wait()
                assert all(chunk._left.query() for chunk in chunks(optimizer))
                assert torch.cuda.memory_allocated(device) == held
        states = [optimizer.state[parameter] for parameter in parameters]
        if offload_optimizer:
            assert all(state[name].is_pinned() for state in states for name in MOMENTS)
        found.append(
            [
                value.cpu()
                for p, state in zip(parameters, states, strict=True)
                for value in (p.detach(), *state.values())
            ]
        )
    for torchs, ours in zip(*found, strict=True):
        assert torch.equal(torchs, ours)
