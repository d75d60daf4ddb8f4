"""How a global batch is split over ranks and micro-batches cannot change its gradient. Real DeepSpeed."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from tests.engine.jobs import start_job
from tests.engine.packs import collate_samples, random_samples
from tests.engine.split_worker import gradient
from vl3train.config.choices import Dtype, MasterDtype, Recompute
from vl3train.config.optim_options import OptimConfig
from vl3train.config.schema import PARTS, MachineConfig
from vl3train.engine import step as step_module
from vl3train.engine.optim.build import build_optimizer
from vl3train.engine.ranks import join
from vl3train.engine.step import train_step
from vl3train.engine.zero import engine as zero_engine
from vl3train.engine.zero.transfer import Reading
from vl3train.engine.zero.zero1_bf16 import drop_masters
from vl3train.model.packed_forward import PackedModel
from vl3train.model.trainable import part_of
from vl3train.model.weights.from_parts import load_model


@pytest.fixture(scope="module")
def rank():
    return join(MachineConfig())


@pytest.fixture(scope="module")
def whole(tiny_model_dir, rank):
    """The gradient of the batch as one pack on one rank."""
    return gradient(tiny_model_dir, rank, zero_stage=0, accumulation=1)


def engine_of(model_dir, rank, *, num_micro_batches):
    model = PackedModel(load_model(model_dir, dtype=torch.bfloat16), "reference")
    engine = zero_engine.Zero(
        model,
        build_optimizer(
            [{"name": "all", "params": list(model.parameters()), "lr": 1e-3}], OptimConfig(), rank.device
        ),
        machine=MachineConfig(),
        optim=OptimConfig(),
        num_micro_batches=num_micro_batches,
        rank=rank,
    )
    return engine, model


def norms_of_parts(gradient):
    """The norm of each part of a whole gradient."""
    found = dict.fromkeys(PARTS, 0.0)
    for name, change in gradient.items():
        found[part_of(name)] += float(change.square().sum())
    return {part: square**0.5 for part, square in found.items()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(
            found[name], wanted[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_one_rank_any_accumulation_same_gradient(tiny_model_dir, rank, whole, zero_stage, accumulation):
    found, norm, part_norms = gradient(tiny_model_dir, rank, zero_stage=zero_stage, accumulation=accumulation)
    assert_same(found, whole[0])
    assert norm == pytest.approx(whole[1], rel=1e-4)
    assert part_norms == pytest.approx(norms_of_parts(whole[0]), rel=1e-4)


@pytest.mark.parametrize(
    "recompute",
    [pytest.param(one, marks=() if one is Recompute.mlp else pytest.mark.long) for one in Recompute],
)
def test_compiled_layers_under_zero_3_at_every_level(tiny_model_dir, rank, whole, recompute, monkeypatch):
    """It gathers whole layers, and what these keep for the backward pass is not their weights. Traced as on a GPU,
    without kernels."""
    traced = functools.partial(torch.compile, backend="aot_eager_decomp_partition", dynamic=True)
    monkeypatch.setattr(torch, "compile", lambda function, **_: traced(function))
    torch._dynamo.reset()
    found, norm, _ = gradient(
        tiny_model_dir, rank, zero_stage=3, accumulation=2, compile_layers=True, recompute=recompute
    )
    assert_same(found, whole[0])
    assert norm == pytest.approx(whole[1], rel=1e-4)


def in_two_processes(python, module, *arguments):
    process, _ = start_job(python, module, [str(argument) for argument in arguments])
    assert process.wait(timeout=300) == 0


@pytest.mark.two_processes
def test_two_ranks_any_accumulation_same_gradient(warm_python, tiny_model_dir, rank, whole, tmp_path):
    """Also where records share a prefix: it is that of the records apart, on one rank."""
    out = tmp_path / "gradients.pt"
    in_two_processes(warm_python, "tests.engine.split_worker", tiny_model_dir, out)
    results = torch.load(out)
    apart, norm, _ = gradient(tiny_model_dir, rank, zero_stage=0, accumulation=1, families=False)
    for zero_stage in (0, 1, 2, 3):
        found, found_norm, _ = results.pop(("families", zero_stage))
        assert_same(found, apart)
        assert found_norm == pytest.approx(norm, rel=1e-4)
    half = [results.pop(("bfloat16", m)) for m in (1, 2)]
    assert set(results) == {(stage, m) for stage in (0, 1, 2, 3) for m in (1, 2)}
    norms = norms_of_parts(whole[0])
    for found, norm, part_norms in half:  # ZeRO-1 in bfloat16 sums its gradients in our own lines
        assert norm == pytest.approx(whole[1], rel=0.03)
        assert part_norms == pytest.approx(norms, rel=0.03)
        assert found.keys() == whole[0].keys()
    for found, norm, part_norms in results.values():
        assert_same(found, whole[0])
        assert norm == pytest.approx(whole[1], rel=1e-4)
        assert part_norms == pytest.approx(norms, rel=1e-4)


@pytest.mark.long
@pytest.mark.two_processes
def test_two_ranks_with_compiled_layers_under_zero_3(warm_python, tiny_model_dir, whole, tmp_path):
    out = tmp_path / "gradients.pt"
    in_two_processes(warm_python, "tests.engine.split_worker", tiny_model_dir, out, "compiled")
    for found, norm, _ in torch.load(out).values():
        assert_same(found, whole[0])
        assert norm == pytest.approx(whole[1], rel=1e-4)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_clipping_scales_the_update_down_to_the_limit(tiny_model_dir, rank, whole, zero_stage):
    limit = whole[1] / 10
    found, norm, _ = gradient(
        tiny_model_dir, rank, zero_stage=zero_stage, accumulation=2, max_grad_norm=limit
    )
    assert norm == pytest.approx(whole[1], rel=1e-4), "the norm that is reported is the one before clipping"
    clipped = torch.stack([g.norm() for g in found.values()]).norm().item()
    assert clipped == pytest.approx(limit, rel=1e-3)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bfloat16_keeps_float32_masters_and_sums(tiny_model_dir, rank, whole, zero_stage):
    found, norm, part_norms = gradient(
        tiny_model_dir, rank, zero_stage=zero_stage, accumulation=2, dtype=Dtype.bfloat16
    )
    assert norm == pytest.approx(whole[1], rel=0.03)
    assert part_norms == pytest.approx(norms_of_parts(whole[0]), rel=0.03)
    assert found.keys() == whole[0].keys()


def test_clipping_works_in_bfloat16_under_zero_1_where_the_norm_is_taken_in_our_own_lines(
    tiny_model_dir, rank, whole
):
    limit = whole[1] / 4
    found, norm, _ = gradient(
        tiny_model_dir, rank, zero_stage=1, accumulation=2, dtype=Dtype.bfloat16, max_grad_norm=limit
    )
    assert norm == pytest.approx(whole[1], rel=0.03)
    clipped = torch.stack([g.norm() for g in found.values()]).norm().item()
    assert clipped == pytest.approx(limit, rel=0.05)


@pytest.mark.parametrize("master_dtype", [MasterDtype.bfloat16, MasterDtype.split])
def test_without_masters_the_float32_ones_are_let_go(tiny_model_dir, rank, monkeypatch, master_dtype):
    model = PackedModel(load_model(tiny_model_dir, dtype=torch.bfloat16), "reference")
    groups = [{"name": "all", "params": list(model.parameters()), "lr": 1e-3}]
    split = master_dtype is MasterDtype.split
    optim = OptimConfig(state_dtype=Dtype.float32 if split else Dtype.bfloat16, master_dtype=master_dtype)
    masters = []

    def watched(optimizer, *keep_low_bits):
        masters.extend(weakref.ref(flat.untyped_storage()) for flat in optimizer.fp32_groups_flat_partition)
        drop_masters(optimizer, *keep_low_bits)

    monkeypatch.setattr(zero_engine, "drop_masters", watched)
    engine = zero_engine.Zero(
        model,
        build_optimizer(groups, optim, rank.device, offload_optimizer=split),
        machine=MachineConfig(offload_optimizer=split),
        optim=optim,
        num_micro_batches=1,
        rank=rank,
    )
    (weights,), (updated,) = engine.optimizer.bf16_groups_flat, engine.optimizer.fp32_groups_flat_partition
    assert updated.data_ptr() == weights.data_ptr()
    gc.collect()
    assert [master() for master in masters] == [None]
    kept = [tensor for state in engine.optimizer.state.values() for tensor in state.values()]
    assert [tensor.dtype for tensor in kept] == [torch.int16] * split


@pytest.mark.two_processes
def test_each_rank_saves_its_own_share_of_masters_that_are_not_float32(warm_python, tiny_model_dir, tmp_path):
    """They are views of the weights of all ranks, of which torch.save writes the whole."""
    in_two_processes(warm_python, "tests.engine.masters_worker", tiny_model_dir, tmp_path)
    found = torch.load(tmp_path / "found.pt")
    # Bytes of a parameter: weight and moments in bfloat16; weight, lower half and moments in float32.
    for master_dtype, of_parameter in (("bfloat16", 2 + 4), ("split", 2 + 2 + 8)):
        assert found[master_dtype] == {"moved": True, "loaded": True}
        sizes = [path.stat().st_size for path in (tmp_path / master_dtype).rglob("*optim_states.pt")]
        assert len(sizes) == 2
        for size in sizes:
            assert size == pytest.approx(of_parameter * found["parameters"] / 2, rel=0.08)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_frozen_parts_do_not_change_by_a_bit(tiny_model_dir, rank, zero_stage):
    found, *_ = gradient(
        tiny_model_dir, rank, zero_stage=zero_stage, accumulation=1, trainable=("vision_encoder", "projector")
    )
    for name, change in found.items():
        frozen = "language_model" in name or "lm_head" in name
        assert (change == 0).all() == frozen, name


def test_deepspeed_never_waits_for_the_device_to_take_its_times(tiny_model_dir, rank, monkeypatch):
    """It did in every micro-batch from the third step on: what was to be copied beside the work stopped it."""
    waits = []
    monkeypatch.setattr(type(get_accelerator()), "synchronize", lambda *_: waits.append(1))
    engine, model = engine_of(tiny_model_dir, rank, num_micro_batches=2)
    waits.clear()  # what DeepSpeed does when it is made is no matter
    batch = collate_samples(random_samples(model.model.config, count=2))
    for _ in range(4):
        step = train_step(
            engine, [batch, batch], num_supervised_tokens=9, num_sources=2, stop_requested=False
        )
        assert step.loss > 0
    assert waits == []


def test_nothing_small_goes_to_the_device_while_moments_come_in(tiny_model_dir, rank, monkeypatch):
    """A GPU copies each way in the order asked: behind 64 GB, 9 KB held up a step of the 7B for 145 ms."""
    acts = []
    sent, forward = step_module.to_device, zero_engine.Zero.forward

    def watched_forward(self, batch, **place):
        acts.append("last forward pass" if place["last"] else "forward pass")
        return forward(self, batch, **place)

    monkeypatch.setattr(step_module, "to_device", lambda *args: acts.append("small") or sent(*args))
    monkeypatch.setattr(zero_engine.Zero, "forward", watched_forward)
    engine, model = engine_of(tiny_model_dir, rank, num_micro_batches=2)
    batch = collate_samples(random_samples(model.model.config, count=2))
    train_step(engine, [batch] * 2, num_supervised_tokens=9, num_sources=2, stop_requested=False)
    assert acts == ["small", "small", "forward pass", "small", "last forward pass"], "none behind"


def test_what_a_step_reports_is_on_its_way_before_the_update(tiny_model_dir, rank, monkeypatch):
    """Behind it, 40 bytes would queue behind 16 GB of AdamW's moments on their way to the host."""
    acts = []
    monkeypatch.setattr(zero_engine, "Reading", lambda values: acts.append("report") or Reading(values))
    engine, model = engine_of(tiny_model_dir, rank, num_micro_batches=1)
    update = engine.optimizer.optimizer.step
    monkeypatch.setattr(engine.optimizer.optimizer, "step", lambda: acts.append("update") or update())
    batch = collate_samples(random_samples(model.model.config, count=2))
    step = train_step(engine, [batch], num_supervised_tokens=9, num_sources=2, stop_requested=False)
    assert acts == ["report", "update"]
    assert step.grad_norm > 0
