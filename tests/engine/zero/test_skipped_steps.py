"""A step with bad numbers changes nothing, and the next ones are those of a run that never met it. Real DeepSpeed."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from tests.engine.packs import collate_samples, random_samples
from vl3train.config.choices import Device, Dtype, MasterDtype
from vl3train.config.optim_options import OptimConfig
from vl3train.config.schema import MachineConfig
from vl3train.engine.optim.build import build_optimizer
from vl3train.engine.ranks import join
from vl3train.engine.step import NO_LIMITS, Limits, train_step
from vl3train.engine.zero.engine import Zero
from vl3train.model.packed_forward import PackedModel
from vl3train.model.weights.from_parts import load_model

KINDS = {
    **{f"stage {stage}": (MachineConfig(zero_stage=stage, dtype=Dtype.float32), {}) for stage in range(4)},
    **{f"bfloat16, stage {stage}": (MachineConfig(zero_stage=stage), {}) for stage in (1, 2)},
    "stochastic": (MachineConfig(zero_stage=2), {"state_dtype": Dtype.bfloat16}),
    "no masters": (MachineConfig(), {"state_dtype": Dtype.bfloat16, "master_dtype": MasterDtype.bfloat16}),
    "offload": (MachineConfig(offload_optimizer=True), {}),
    "split masters": (MachineConfig(offload_optimizer=True), {"master_dtype": MasterDtype.split}),
    "no clipping": (MachineConfig(), {"max_grad_norm": 0.0}),
}

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = [Device.cpu, pytest.param(Device.cuda, marks=[pytest.mark.gpu, NEEDS_GPU])]

MASTERS = ("fp32_groups_flat_partition", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
"""DeepSpeed's names in its stage 1, stage 2 (and 1 in float32) and stage 3."""


class Trained:
    """A tiny model under ZeRO, and everything that a step may change."""

    def __init__(self, model_dir, kind, device):
        machine, options = KINDS[kind]
        self.rank = join(dataclasses.replace(machine, device=device))
        torch.manual_seed(0)
        self.hf_model = load_model(model_dir, dtype=getattr(torch, machine.dtype.value))
        packed = PackedModel(self.hf_model, "reference").to(self.rank.device)
        # A buffer of odd length is padded; a NaN must not stay in the padding, which no gradient overwrites.
        packed.without_gradient = torch.nn.Parameter(torch.zeros(3, device=self.rank.device))
        optim = OptimConfig(**options)
        parameters = list(packed.parameters())
        groups = [
            {"name": "first", "params": parameters[:9], "lr": 1e-3},
            {"name": "others", "params": parameters[9:], "lr": 2e-3},
        ]
        self.engine = Zero(
            packed,
            build_optimizer(groups, optim, self.rank.device, offload_optimizer=machine.offload_optimizer),
            machine=machine,
            optim=optim,
            num_micro_batches=2,
            rank=self.rank,
        )
        samples = random_samples(self.hf_model.config, count=12)
        self.batches = [collate_samples(samples[start : start + 2]) for start in range(0, 12, 2)]

    def step(self, number, limits=NO_LIMITS):
        torch.manual_seed(number)  # a skipped step draws too
        batches = self.batches[2 * number : 2 * number + 2]
        return train_step(
            self.engine,
            batches,
            num_supervised_tokens=20,
            num_sources=2,
            stop_requested=False,
            limits=limits,
        )

    def step_times(self, factor, *, what):
        """A step whose last micro-batch has its ``what`` times ``factor``."""
        forward, backward = self.engine.forward, self.engine.backward

        def forward_times(batch, **place):
            output = forward(batch, **place)
            if what == "loss" and place["last"]:
                output = output._replace(
                    loss_sum=output.loss_sum * factor, token_losses=output.token_losses * factor
                )
            return output

        self.engine.forward = forward_times
        if what == "gradient":
            self.engine.backward = lambda loss: backward(loss * factor)
        try:
            return self.step(2)
        finally:
            self.engine.forward, self.engine.backward = forward, backward

    def state(self):
        """Weights, masters, moments and counts, as bytes."""
        masters = [
            tensor
            for name in (
                "fp32_groups_flat_partition",
                "single_partition_of_fp32_groups",
                "fp32_partitioned_groups_flat",
            )
            for tensor in getattr(self.engine.optimizer, name, [])
        ]
        states = [copy.deepcopy(list(state.items())) for state in self.engine._update.state.values()]
        weights = self.engine.full_state_dict(self.hf_model)
        return flat([weights, [master.detach() for master in masters], states])


def flat(value):
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return [(key, flat(one)) for key, one in value.items()]
    return [flat(one) for one in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_step_changes_no_bit_and_the_next_steps_are_exact(tiny_model_dir, kind, device):
    run = Trained(tiny_model_dir, kind, device)
    first = run.state()
    assert run.step_times(math.nan, what="loss").is_skipped
    assert run.state()[:2] == first[:2], "weights and masters; the moments are made now"
    assert not run.step(0).is_skipped
    before = run.state()
    assert before[0] != first[0], "a good step trains"
    for factor, what in [
        (math.nan, "loss"), (math.inf, "loss"), (-math.inf, "loss"), (math.nan, "gradient"), (math.inf, "gradient")
    ]:  # fmt: skip
        bad = run.step_times(factor, what=what)
        assert bad.is_skipped
        assert not math.isfinite(bad.loss if what == "loss" else bad.grad_norm)
        assert run.state() == before, (factor, what)
    for limits in (Limits(loss=1e-3), Limits(grad_norm=1e-6)):
        spike = run.step(1, limits)
        assert spike.is_skipped
        assert math.isfinite(spike.loss)
        assert math.isfinite(spike.grad_norm)
        assert run.state() == before, limits
    good = [run.step(1), run.step(2)]

    straight = Trained(tiny_model_dir, kind, device)
    wanted = [straight.step(number) for number in range(3)][1:]
    assert [(step.loss, step.grad_norm) for step in good] == [(step.loss, step.grad_norm) for step in wanted]
    assert run.state() == straight.state()


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("kind", ["bfloat16, stage 1", "no masters", "offload", "split masters"])
def test_neither_a_good_nor_a_bad_step_makes_the_host_wait(tiny_model_dir, kind):
    run = Trained(tiny_model_dir, kind, Device.cuda)
    step = run.engine.step

    def watched(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    run.step(0)  # creates state and loads kernels
    run.engine.step = watched
    assert not run.step(1).is_skipped
    assert run.step_times(math.nan, what="loss").is_skipped
    assert run.step(1, Limits(grad_norm=1e-6)).is_skipped
