"""memory=auto counts what only a real step brings: AdamW's states."""

from __future__ import annotations

import pytest
import torch

from tests.engine.test_memory import ROOMY, counted, pack, peak_of
from tests.model.conftest import make_model
from vl3train.config.choices import Dtype, Recompute
from vl3train.config.schema import MachineConfig, OptimConfig
from vl3train.engine import host_adamw
from vl3train.engine.memory import fit_memory
from vl3train.engine.optim import build_optimizer
from vl3train.engine.ranks import join
from vl3train.engine.step import train_step
from vl3train.engine.zero import Zero
from vl3train.model.packed_forward import PackedModel
from vl3train.model.recomputation import Levels


@pytest.fixture(scope="module")
def rank():
    return join(MachineConfig())


@pytest.mark.parametrize(
    ("zero_stage", "dtype"), [(1, Dtype.bfloat16), (2, Dtype.bfloat16), (0, Dtype.float32)], ids=str
)
def test_steps_fit_too_with_the_states_that_the_first_one_makes(rank, zero_stage, dtype):
    model = make_model(layers=4).to(torch.bfloat16 if dtype is Dtype.bfloat16 else torch.float32)
    packed, optim, batch = PackedModel(model, "reference"), OptimConfig(), pack(3, 300)
    parameters = list(packed.parameters())
    states = 8 * sum(parameter.numel() for parameter in parameters)
    engine = Zero(
        packed,
        torch.optim.AdamW(parameters, lr=1e-3, fused=True),
        machine=MachineConfig(zero_stage=zero_stage, dtype=dtype),
        optim=optim,
        num_micro_batches=1,
        rank=rank,
    )
    engine.train(True)
    assert engine.states_to_come() == states
    peaks = []
    for level in (Recompute.elementwise, Recompute.offload):
        packed.choose_levels = lambda _, level=level: Levels((level,) * 4, (level,) * 4)
        peaks.append(peak_of(engine, batch))
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


def test_a_step_begins_with_room_for_the_means_that_leave_and_ends_with_those_that_come(rank, monkeypatch):
    """On a GPU the means of the step before are on their way to the host when a step begins."""
    monkeypatch.setattr(host_adamw, "PIECE_VALUES", 2000)
    model = make_model(layers=4).to(torch.bfloat16)
    packed, optim, batch = PackedModel(model, "reference"), OptimConfig(), pack(3, 300)
    groups = [{"name": "all", "params": list(packed.parameters()), "lr": 1e-3, "weight_decay": 0.0}]
    engine = Zero(
        packed,
        build_optimizer(groups, optim, rank.device, states_on_host=True),
        machine=MachineConfig(states_on_host=True),
        optim=optim,
        num_micro_batches=2,
        rank=rank,
    )
    engine.train(True)
    assert engine.states_to_come() == 0
    means = engine.host_adamw.num_bytes()
    assert means >= 8 * sum(parameter.numel() for parameter in packed.parameters())
    peaks = []
    for level in (Recompute.elementwise, Recompute.layer):
        packed.choose_levels = lambda _, level=level: Levels((level,) * 4, (level,) * 4)
        peaks.append(peak_of(engine, batch))
    limit = int(0.9 * peaks[0] + 0.1 * peaks[1])
    supervised, found, waits = len(batch.supervised_positions), [], []
    backward, wait = engine.backward, engine.host_adamw.wait

    def watched(loss, *, last=False):
        backward(loss, last=last)
        found.append(memory.peak())
        memory.reset_peak()

    with counted(engine, batch, ROOMY, ROOMY - limit) as memory:
        engine.memory = memory
        fit_memory(engine, packed, batch, memory, pack_name="the worst pack", say=lambda _: None)
        spared = engine.hold_back(batch)
        monkeypatch.setattr(engine, "backward", watched)
        monkeypatch.setattr(engine.host_adamw, "wait", lambda **left: waits.append(left) or wait(**left))
        memory.reset_peak()
        for _ in range(3):
            train_step(
                engine, [batch, batch], num_supervised_tokens=supervised, num_sources=1, stop_requested=False
            )
    assert 0 < spared <= means
    assert waits == [{"max_bytes_left": spared}] * 3
    assert max(found[::2]) <= limit - spared, "the first of each step"
    assert 0.85 * limit < max(found[1::2]) <= limit, "the last"
    assert memory.peak() <= limit
    assert packed.levels_of(batch, first=True) != packed.levels_of(batch, first=False)
