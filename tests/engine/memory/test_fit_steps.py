"""memory=auto counts what only a real step brings: AdamW's states."""

from __future__ import annotations

import contextlib

import pytest
import torch

from tests.engine.memory.test_fit import ROOMY, counted, engine_of, fitted_in, pack, peak_of
from tests.long import first_of
from tests.model.conftest import make_model
from vl3train.config.choices import Dtype, Recompute
from vl3train.config.optim_options import OptimConfig
from vl3train.config.schema import MachineConfig
from vl3train.engine.memory.fit import fit_memory
from vl3train.engine.optim import offload_adamw, offload_schedule
from vl3train.engine.optim.build import build_optimizer
from vl3train.engine.ranks import join
from vl3train.engine.step import train_step
from vl3train.engine.zero.engine import Zero
from vl3train.model import packed_forward
from vl3train.model.activations.last_layer import last_positions
from vl3train.model.activations.work import pack_size, uniform_plan
from vl3train.model.packed_forward import PackedModel

pytestmark = pytest.mark.usefixtures("most_supervised")


@pytest.fixture(scope="module")
def rank():
    return join(MachineConfig())


@pytest.mark.parametrize(
    ("zero_stage", "dtype"), first_of((1, Dtype.bfloat16), (2, Dtype.bfloat16), (0, Dtype.float32)), ids=str
)
def test_steps_fit_too_with_the_states_that_the_first_one_makes(rank, zero_stage, dtype):
    model = make_model(layers=4).to(torch.bfloat16 if dtype is Dtype.bfloat16 else torch.float32)
    packed, optim, batch = PackedModel(model, "reference"), OptimConfig(), pack(3, 300)
    parameters = list(packed.parameters())
    states = 8 * sum(parameter.numel() for parameter in parameters)
    engine = Zero(
        packed,
        torch.optim.AdamW([{"name": "all", "params": parameters}], lr=1e-3, fused=True),
        machine=MachineConfig(zero_stage=zero_stage, dtype=dtype),
        optim=optim,
        num_micro_batches=1,
        rank=rank,
    )
    engine.train(True)
    assert engine.states_to_come() == states
    peaks = []
    for level in (Recompute.elementwise, Recompute.offload):
        peaks.append(peak_of(engine, batch, uniform_plan(level, level, (4, 4))))
    limit = int(sum(peaks) / 2) + states
    supervised = len(batch.supervised_positions)
    with counted(engine, batch, ROOMY, ROOMY - limit) as memory:
        fit_memory(engine, packed, batch, memory, pack_name="the worst pack", say=lambda _: None)
        memory.reset_peak()
        for _ in range(2):
            train_step(engine, [batch], num_supervised_tokens=supervised, num_sources=1, stop_requested=False)
    assert memory.peak() <= limit
    assert memory.peak() > 0.85 * limit, "memory that is there is used"
    assert engine.states_to_come() == 0


@contextlib.contextmanager
def fitted_on_host(rank, batch, *, share=0.9, num_micro_batches=3):
    """An engine whose moments wait on the host, fitted to that share between its least and its most, with its limit."""
    model = make_model(layers=4).to(torch.bfloat16)
    packed, optim = PackedModel(model, "reference"), OptimConfig()
    groups = [{"name": "all", "params": list(packed.parameters()), "lr": 1e-3, "weight_decay": 0.0}]
    engine = Zero(
        packed,
        build_optimizer(groups, optim, rank.device, offload_optimizer=True),
        machine=MachineConfig(offload_optimizer=True),
        optim=optim,
        num_micro_batches=num_micro_batches,
        rank=rank,
    )
    engine.train(True)
    assert engine.states_to_come() == 0
    peaks = []
    for level in (Recompute.elementwise, Recompute.layer):
        peaks.append(peak_of(engine, batch, uniform_plan(level, level, (4, 4))))
    limit = int(share * peaks[0] + (1 - share) * peaks[1])
    scattered = engine.offload_schedule.scattered()
    assert scattered == int(offload_schedule.SCATTERED * engine.offload_schedule.optimizer.num_bytes()) > 0
    with counted(engine, batch, ROOMY, ROOMY - limit - scattered) as memory:
        fitted = fit_memory(engine, packed, batch, memory, pack_name="the worst pack", say=lambda _: None)
        assert fitted.limit_bytes == limit
        yield engine, packed, memory, limit


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(offload_adamw, "CHUNK_VALUES", 2000)


@pytest.fixture
def on_host(rank, small_chunks):
    batch = pack(3, 300)
    with fitted_on_host(rank, batch) as (engine, packed, memory, limit):
        yield engine, packed, batch, memory, limit


def steps(engine, batch, number, num_micro_batches=3):
    supervised = len(batch.supervised_positions)
    for _ in range(number):
        train_step(
            engine,
            [batch] * num_micro_batches,
            num_supervised_tokens=supervised,
            num_sources=1,
            stop_requested=False,
        )


@pytest.mark.long
@pytest.mark.parametrize("share", [0.1, 0.6])  # little and much is kept
def test_a_step_of_one_micro_batch_stays_within_the_limit_too(rank, small_chunks, share):
    """Its first layer backward keeps all and recomputes nothing, later ones recompute: with moments in all that it had
    freed, a pack of 131 072 tokens ran out of memory."""
    batch = pack(1, 1000)
    with fitted_on_host(rank, batch, share=share, num_micro_batches=1) as (engine, _, memory, limit):
        levels = engine.plan_of(batch, first=False, last=False).language
        assert levels[-1] is Recompute.elementwise is not levels[0]
        memory.reset_peak()
        steps(engine, batch, 3, num_micro_batches=1)
        assert 0.9 * limit < memory.peak() <= limit


def work_that_carries(engine, batch, of_moments, direction):
    """So that the link carries that share of the moments while ``direction`` of a micro-batch is computed."""
    work = getattr(engine.offload_schedule.budget.rates, direction)(pack_size(batch))
    return int(work / (of_moments * engine.offload_schedule.optimizer.num_bytes()))


@pytest.mark.long
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_the_first_micro_batch_keeps_less_by_the_moments_that_the_link_cannot_carry_meanwhile(
    on_host, monkeypatch, share
):
    engine, packed, batch, memory, limit = on_host
    moments = engine.offload_schedule.optimizer.num_bytes()
    assert moments >= 8 * sum(parameter.numel() for parameter in packed.parameters())
    a_crossing = work_that_carries(engine, batch, share, "forward") if share else 10**18
    monkeypatch.setattr(offload_schedule, "WORK_A_CROSSING", a_crossing)
    reserved_bytes = engine.reserved_bytes(batch, first=True, last=False)
    left = offload_schedule.LEFT_IN_UPDATE
    assert reserved_bytes == pytest.approx((1 - left - share) * moments, rel=0.01)
    assert engine.reserved_bytes(batch, first=False, last=False) == 0
    spared, found, waits = engine.offload_schedule.budget.can_spare(pack_size(batch), reserved_bytes), [], []
    assert spared <= reserved_bytes
    assert (spared > 10_000) == (share < 0.9)
    backward, wait = engine.backward, engine.offload_schedule.optimizer.wait

    def watched(loss):
        backward(loss)
        found.append(memory.peak())
        memory.reset_peak()

    monkeypatch.setattr(engine, "backward", watched)
    monkeypatch.setattr(
        engine.offload_schedule.optimizer,
        "wait",
        lambda max_bytes_left=0: waits.append(max_bytes_left) or wait(max_bytes_left),
    )
    memory.reset_peak()
    steps(engine, batch, 3)
    assert len(waits) == 3 * (8 + 1 + 7), (
        "before each layer of the first micro-batch, before the last one, and behind each but one of its layers"
    )
    assert waits == waits[:16] * 3
    assert waits[8:16] == [0] * 8
    assert waits[:8] == sorted(waits[:8], reverse=True)
    assert waits[7] >= spared, "when the forward pass ends, what was spared may still be there"
    assert max(found[::3]) <= limit - spared, "the first of each step"
    assert 0.85 * limit < max(found[1::3]) <= limit, "in between"
    assert memory.peak() <= limit


@pytest.mark.parametrize("share", first_of(0.2, 0.8))
def test_the_last_micro_batch_begins_with_the_moments_that_its_backward_pass_cannot_bring(
    on_host, monkeypatch, share
):
    engine, _, batch, memory, limit = on_host
    steps(engine, batch, 1)  # makes the moments
    a_crossing = work_that_carries(engine, batch, share, "backward")
    monkeypatch.setattr(offload_schedule, "WORK_A_CROSSING", a_crossing)
    moments = engine.offload_schedule.optimizer
    reserved_bytes = engine.reserved_bytes(batch, first=False, last=True)
    assert reserved_bytes == pytest.approx((1 - share) * moments.num_bytes(), rel=0.01)
    there, peaks, forward, backward = [], [], engine.forward, engine.backward

    def prefetched_bytes():
        return sum(chunk.num_bytes for chunk in moments._all_chunks() if chunk.is_on_device)

    def watched_forward(batch, *, first, last):
        output = forward(batch, first=first, last=last)
        there.append(prefetched_bytes())
        return output

    def watched_backward(loss):
        backward(loss)
        peaks.append(memory.peak())
        there.append(prefetched_bytes())

    monkeypatch.setattr(engine, "forward", watched_forward)
    monkeypatch.setattr(engine, "backward", watched_backward)
    memory.reset_peak()
    steps(engine, batch, 1)
    *before, early, all_of_them = there
    assert before == [0] * 4, "not in the first two micro-batches"
    spared = engine.offload_schedule.budget.can_spare(pack_size(batch), reserved_bytes)
    # In chunks of 16 000 bytes at most, as many as the chosen levels leave room for.
    plan = engine.plan_of(batch, first=False, last=True)
    room = engine.offload_schedule.budget.room_beside(pack_size(batch), plan)[-1]
    assert 0 < spared - 16000 < early <= room
    assert early <= all_of_them
    assert peaks[-1] <= limit


def test_the_budget_is_found_as_if_all_tokens_were_supervised(rank, monkeypatch):
    """So a pack with more of them than the worst one fits as well."""
    engine, packed = engine_of(rank, make_model(layers=4), zero_stage=0)
    monkeypatch.setattr(packed_forward, "last_positions", last_positions)
    seen, mlp = [], packed.model.model.language_model.layers[-1].mlp
    mlp.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    worst = pack(3, 300)
    fitted_in((engine, packed), worst, ROOMY)
    assert set(seen) == {len(worst.input_ids)}
    seen.clear()
    engine.backward(engine.forward(worst).loss_sum * 0)
    assert set(seen) == {len(worst.supervised_positions)}
