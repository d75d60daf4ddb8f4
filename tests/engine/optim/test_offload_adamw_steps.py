"""AdamW with its moments on the host under real DeepSpeed: the same run to the bit, and when its moments come back."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch

from tests.engine.memory.test_fit import ROOMY, counted, pack
from tests.engine.optim.test_split_masters import rounded
from tests.engine.zero.states import write_state
from tests.long import first_of
from tests.model.conftest import make_model
from vl3train.config.choices import MasterDtype
from vl3train.config.optim_options import OptimConfig
from vl3train.config.schema import MachineConfig
from vl3train.engine.memory.fit import fit_memory
from vl3train.engine.optim import offload_adamw, offload_schedule
from vl3train.engine.optim.build import build_optimizer
from vl3train.engine.optim.offload_adamw import OffloadAdamW
from vl3train.engine.optim.split_masters import LOW_BITS
from vl3train.engine.optim.split_masters import join as join_halves
from vl3train.engine.optim.stochastic_adamw import MOMENTS
from vl3train.engine.ranks import RunError, join
from vl3train.engine.step import train_step
from vl3train.engine.zero.engine import Zero
from vl3train.model.activations.work import pack_size
from vl3train.model.packed_forward import PackedModel
from vl3train.model.trainable import parameter_groups


@pytest.fixture(scope="module")
def rank():
    return join(MachineConfig())


@functools.cache
def start_model():
    torch.manual_seed(7)
    return make_model(layers=4).to(torch.bfloat16)


BATCHES = ((1, 300), (3, 20), (2, 100))


def engine_of(rank, offload_optimizer, num_micro_batches=3, masters=MasterDtype.float32):
    """Two groups, ZeRO-1 in bfloat16."""
    model, optim = copy.deepcopy(start_model()), OptimConfig(master_dtype=masters)
    groups = parameter_groups(model, {"vision_encoder": 1e-3, "projector": 1e-2, "language_model": 2e-3}, 0.1)
    engine = Zero(
        PackedModel(model, "reference"),
        build_optimizer(groups, optim, rank.device, offload_optimizer=offload_optimizer),
        machine=MachineConfig(offload_optimizer=offload_optimizer),
        optim=optim,
        num_micro_batches=num_micro_batches,
        rank=rank,
    )
    engine.train(True)
    return engine


def train(engine, steps):
    batches = [pack(*size) for size in BATCHES][-engine.engine.gradient_accumulation_steps() :]
    for step in steps:
        for group in engine.optimizer.param_groups:
            group["lr"] = group["peak_lr"] / (1 + step)
        train_step(engine, batches, num_supervised_tokens=40, num_sources=1, stop_requested=False)


def outcome(engine):
    """Weights, masters and moments."""
    found = dict(engine.full_state_dict(engine.engine.module.model))
    for number, master in enumerate(engine.optimizer.fp32_groups_flat_partition):
        state = engine.optimizer.state[master]
        whole = join_halves(master, state[LOW_BITS]) if LOW_BITS in state else master
        found[f"master {number}"] = whole.detach().clone()
        found |= {f"{name} {number}": state[name].clone() for name in ("step", *MOMENTS)}
    return found


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


@pytest.fixture(scope="module")
def straight(rank):
    """Four steps with the moments on the device."""
    engine = engine_of(rank, False)
    train(engine, range(4))
    return outcome(engine)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(offload_adamw, "CHUNK_VALUES", 5000)


@pytest.mark.parametrize("first", [False, True], ids=["begun on the device", "begun on the host"])
@pytest.mark.parametrize("then", [False, True], ids=["resumed on the device", "resumed on the host"])
def test_a_resumed_run_ends_where_a_straight_one_does_wherever_its_moments_lie(
    rank, straight, tmp_path, small_chunks, first, then
):
    engine = engine_of(rank, first)
    train(engine, range(2))
    write_state(engine, tmp_path)
    train(engine, range(2, 4))
    assert_equal(outcome(engine), straight)
    resumed = engine_of(rank, then)
    resumed.load(tmp_path)
    train(resumed, range(2, 4))
    assert_equal(outcome(resumed), straight)


@pytest.mark.parametrize("num_micro_batches", first_of(1, 3))
def test_moments_come_back_in_the_last_backward_pass_as_layers_free_memory(
    rank, straight, small_chunks, monkeypatch, num_micro_batches
):
    engine = engine_of(rank, True, num_micro_batches)
    optimizer, calls, passes = engine.offload_schedule.optimizer, [], []
    prefetch, backward = OffloadAdamW.prefetch, Zero.backward
    worst = pack(*BATCHES[0])
    with counted(engine, worst, ROOMY) as memory:
        packed = engine.engine.module
        engine.offload_schedule.budget = fit_memory(
            engine, packed, worst, memory, pack_name="the worst", say=lambda _: None
        ).budget
        # Room for what the last pack of a step keeps, and little more.
        last = pack_size(pack(*BATCHES[-1]))
        _, total = engine.offload_schedule.budget.needed_bytes(
            last, engine.plan_of(pack(*BATCHES[-1]), first=False, last=False)
        )
        engine.offload_schedule.budget = replace(
            engine.offload_schedule.budget, vision_bytes=total + 10_000, total_bytes=total + 10_000
        )
        monkeypatch.setattr(offload_schedule, "WORK_A_CROSSING", 1)  # all of them while a pack runs backward

        def watched_backward(self, loss):
            passes.append(loss)
            backward(self, loss)

        def watched_prefetch(self, max_bytes):
            prefetch(self, max_bytes)
            there = [chunk.num_bytes for chunk in self._all_chunks() if chunk.is_on_device]
            assert sum(there) <= max_bytes
            calls.append((len(passes), len(there)))

        monkeypatch.setattr(Zero, "backward", watched_backward)
        monkeypatch.setattr(OffloadAdamW, "prefetch", watched_prefetch)
        train(engine, range(1))
        assert [there for _, there in calls] == [0] * len(calls), "before the first update there are none"
        calls.clear()
        train(engine, range(1, 4))
    if num_micro_batches == 3:
        assert_equal(outcome(engine), straight)
    early = num_micro_batches > 1  # before the forward pass of the last, where it is not the first too
    assert len(calls) == 3 * (early + 7), "once a layer, but for the last that runs"
    for step in range(3):
        of_step = calls[(early + 7) * step : (early + 7) * (step + 1)]
        passes_so_far = (step + 2) * num_micro_batches
        assert [number for number, _ in of_step] == [passes_so_far - 1] * early + [passes_so_far] * 7
        there = [there for _, there in of_step]
        assert there == sorted(there)
        assert there[0] < there[3] < there[4 + early], "the room of later layers is used too"
        assert there[-1] > len(list(optimizer._all_chunks())) // 8


def test_nobody_waits_for_moments_that_come_early_until_the_update(
    rank, straight, small_chunks, late_link, monkeypatch
):
    """Beside a light pack all of them come before its forward pass: a host that waits for them has queued nothing."""
    engine, worst, step, seen = engine_of(rank, True), pack(*BATCHES[0]), Zero.step, []
    coming, leaving = late_link
    with counted(engine, worst, ROOMY) as memory:
        fit_memory(engine, engine.engine.module, worst, memory, pack_name="the worst", say=lambda _: None)

        def watched_step(self, totals, is_bad=None):
            seen.append((len(coming), len(leaving)))
            return step(self, totals, is_bad)

        monkeypatch.setattr(Zero, "step", watched_step)
        train(engine, range(4))
    engine.offload_schedule.optimizer.wait()
    assert_equal(outcome(engine), straight)
    num_chunks = len(list(engine.offload_schedule.optimizer._all_chunks()))
    assert seen == [(0, 0), *[(num_chunks, 0)] * 3], "before the first update there are none"


@pytest.mark.parametrize("num_micro_batches", first_of(2, 1, 3))
def test_none_comes_while_others_leave(rank, small_chunks, late_link, monkeypatch, num_micro_batches):
    """Their memory is reused only when their copies have ended, and the host runs ahead of those."""
    engine, worst, prefetch, found = (
        engine_of(rank, True, num_micro_batches),
        pack(*BATCHES[0]),
        OffloadAdamW.prefetch,
        [],
    )
    _, leaving = late_link
    with counted(engine, worst, ROOMY) as memory:
        fit_memory(engine, engine.engine.module, worst, memory, pack_name="the worst", say=lambda _: None)
        monkeypatch.setattr(
            OffloadAdamW, "prefetch", lambda self, room: found.append(len(leaving)) or prefetch(self, room)
        )
        train(engine, range(3))
    assert leaving, "those of the last update"
    assert set(found) == {0}


@pytest.fixture(scope="module")
def straight_rounded(rank):
    """Four steps with float32 masters on the device, of which ties become weights as split masters make them."""
    engine = engine_of(rank, False)
    optimizer = engine.optimizer

    @torch.no_grad()
    def update_lp_params():
        for weights, master in zip(
            optimizer.bf16_groups_flat, optimizer.fp32_groups_flat_partition, strict=True
        ):
            weights.copy_(rounded(master))

    optimizer.update_lp_params = update_lp_params
    train(engine, range(4))
    return outcome(engine)


@pytest.mark.parametrize("stop", first_of(2, 0))
def test_split_masters_are_float32_masters_to_the_bit_in_a_resumed_run_too(
    rank, straight, straight_rounded, tmp_path, small_chunks, stop
):
    assert not torch.equal(straight["master 0"], straight["master 0"].bfloat16().float()), "low bits are used"
    engine = engine_of(rank, True, masters=MasterDtype.split)
    train(engine, range(stop))
    write_state(engine, tmp_path)
    train(engine, range(stop, 4))
    assert_equal(outcome(engine), straight_rounded)
    assert engine.optimizer.fp32_groups_flat_partition[0].dtype == torch.bfloat16
    resumed = engine_of(rank, True, masters=MasterDtype.split)
    resumed.load(tmp_path)
    train(resumed, range(stop, 4))
    assert_equal(outcome(resumed), straight_rounded)
    engine.load(tmp_path)  # over what is there
    train(engine, range(stop, 4))
    assert_equal(outcome(engine), straight_rounded)


@pytest.mark.parametrize("saved", [MasterDtype.split, MasterDtype.float32])
def test_no_engine_takes_masters_of_another_kind(rank, tmp_path, saved):
    engine = engine_of(rank, True, masters=saved)
    train(engine, range(1))
    write_state(engine, tmp_path)
    other = MasterDtype.float32 if saved is MasterDtype.split else MasterDtype.split
    with pytest.raises(RunError, match=r"set optim\.master_dtype as it was, or start a new run"):
        engine_of(rank, True, masters=other).load(tmp_path)
