"""memory=auto counts what only a real step brings: AdamW's states."""

from __future__ import annotations

import pytest
import torch

from tests.engine.test_memory import ROOMY, counted, pack, peak_of
from tests.model.conftest import make_model
from vl3train.config.choices import Dtype, Recompute
from vl3train.config.schema import MachineConfig, OptimConfig
from vl3train.engine.memory import fit_memory
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
