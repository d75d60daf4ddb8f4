"""memory=auto on a CPU whose tensors are counted: the very code of a GPU, with real DeepSpeed."""

from __future__ import annotations

import copy
import functools
import json
import re
from types import SimpleNamespace

import pytest
import torch

from tests.engine.counted_memory import CountedMemory
from tests.model.conftest import make_batch, make_conversation, make_item, make_model
from vl3train.config.choices import Dtype, Recompute
from vl3train.config.load import load_config
from vl3train.config.optim_options import OptimConfig
from vl3train.config.schema import MachineConfig
from vl3train.engine.loop import train
from vl3train.engine.memory import fit as memory_module
from vl3train.engine.memory import fit_run as fit_run_module
from vl3train.engine.memory.device import device_memory
from vl3train.engine.memory.fit import fit_memory
from vl3train.engine.ranks import RunError, join
from vl3train.engine.zero.engine import Zero
from vl3train.model.activations.work import uniform_plan
from vl3train.model.packed_forward import PackedModel
from vl3train.model.trainable import set_trainable

pytestmark = pytest.mark.usefixtures("most_supervised")
ROOMY = 10**11
ORDER = list(Recompute)


@pytest.fixture(scope="module")
def rank():
    return join(MachineConfig())


@functools.cache
def pack(images: int, text: int):
    """A pack of pictures of 192 patches and one long text."""
    torch.manual_seed(images)
    pictures = [make_conversation([make_item((1, 12, 16), 2)], text=4, answer=2) for _ in range(images)]
    return make_batch([*pictures, make_conversation([], text=text, answer=10)], num_loss_chunks=2)


def engine_of(
    rank,
    model,
    *,
    zero_stage=1,
    dtype=Dtype.float32,
    num_micro_batches=2,
    attention="reference",
    compile_layers=False,
):
    packed = PackedModel(model, attention, compile_layers=compile_layers)
    engine = Zero(
        packed,
        torch.optim.SGD(
            [{"name": "all", "params": [p for p in packed.parameters() if p.requires_grad]}], lr=1.0
        ),
        machine=MachineConfig(zero_stage=zero_stage, dtype=dtype),
        optim=OptimConfig(max_grad_norm=0.0),
        num_micro_batches=num_micro_batches,
        rank=rank,
    )
    engine.train(True)
    return engine, packed


@pytest.fixture(scope="module")
def small(rank):
    """A model of four layers and its engine; without ZeRO, whose buckets would hide everything else."""
    return engine_of(rank, make_model(layers=4), zero_stage=0)


def states_to_come(packed):
    """AdamW's two states of each weight, which torch makes in the first step."""
    return sum(2 * parameter.nbytes for parameter in packed.parameters())


def counted(engine, batch, device_bytes, margin_bytes=0):
    """A device that holds the model, masters, gradients so far and the batch."""
    weights = list(engine.engine.module.parameters())
    there = [*weights, *engine.engine.module.buffers(), *batch.tensors().values()]
    there += [weight.grad for weight in weights if weight.grad is not None]
    for name in ("fp32_groups_flat_partition", "fp32_groups_gradients_flat"):  # of ZeRO-1 in bfloat16
        there += getattr(engine.optimizer, name, [])
    return CountedMemory(device_bytes, margin_bytes, there=there)


def peak_of(engine, batch, plan=None):
    """What a real micro-batch takes at its peak, by ``plan`` or by the engine's own."""
    with counted(engine, batch, ROOMY) as memory:
        engine.backward(engine.forward(batch, plan=plan).loss_sum * 0)
    return memory.peak()


def fitted_in(small, batch, device_bytes, margin_bytes=0):
    with counted(small[0], batch, device_bytes, margin_bytes) as memory:
        return fit_memory(*small, batch, memory, pack_name="the worst pack", say=lambda _: None)


@pytest.fixture(scope="module")
def extremes(small):
    """Peaks of the worst pack with nothing but products kept, and with everything on the host."""
    engine, _ = small
    levels = (Recompute.elementwise, Recompute.offload)
    return [peak_of(engine, pack(3, 300), uniform_plan(level, level, (4, 4))) for level in levels]


def test_with_room_for_all_only_elementwise_work_is_recomputed(small):
    fitted = fitted_in(small, pack(3, 300), ROOMY)
    assert str(fitted.plan) == "encoder 4 x elementwise, language model 4 x elementwise"
    assert fitted.peak_bytes < fitted.limit_bytes == ROOMY - states_to_come(small[1])


def test_the_tighter_the_memory_the_more_is_recomputed_and_no_pack_exceeds_it(small, extremes):
    engine, packed = small
    most, least = extremes
    work, kept = [], []
    for share in (0.8, 0.4):
        limit = int(least + share * (most - least))
        fitted = fitted_in(small, pack(3, 300), ROOMY, ROOMY - limit - states_to_come(packed))
        assert fitted.limit_bytes == limit
        assert fitted.peak_bytes <= limit
        assert fitted.peak_bytes > 0.85 * limit, "memory that is there is used"
        for other in (pack(1, 300), pack(3, 20)):
            assert peak_of(engine, other) <= limit
        work.append(fitted.budget.rates.of(pack(3, 300), fitted.plan))
        kept.append(sum(fitted.budget.kept_bytes(memory_module.pack_size(pack(3, 300)), fitted.plan)))
        smaller = engine.plan_of(pack(1, 20), first=False, last=False)
        assert fitted.budget.rates.of(pack(1, 20), smaller) <= work[-1]
    assert work == sorted(work)
    assert work[0] < work[-1]
    assert kept == sorted(kept, reverse=True)


def test_bytes_of_each_level_are_those_that_the_forward_pass_keeps(small):
    engine, _ = small
    fitted = fitted_in(small, pack(3, 300), ROOMY)
    size = memory_module.pack_size(pack(3, 300))
    rests, held_by_all = [], 0
    for level in (Recompute.elementwise, Recompute.mlp, Recompute.layer, Recompute.offload):
        plan = uniform_plan(level, level, (4, 4))
        with counted(engine, pack(3, 300), ROOMY) as memory:
            output = engine.forward(pack(3, 300), plan=plan)
            held = memory.held()
        del output
        held_by_all = max(held_by_all, held)
        rests.append(held - sum(fitted.budget.kept_bytes(size, plan)))
    assert rests[0] > 0
    assert max(rests) - min(rests) < 0.02 * held_by_all


def test_what_runs_out_of_memory_is_tried_with_less_and_ends_in_offload(small, extremes, monkeypatch):
    monkeypatch.setattr(Zero, "states_to_come", lambda self: 0)  # as in a run that is resumed
    least = extremes[1]
    fitted = fitted_in(small, pack(3, 300), int(least * 1.05))
    assert Recompute.offload in fitted.plan.language + fitted.plan.vision
    assert fitted.peak_bytes <= least * 1.05


def test_a_dry_run_over_the_limit_is_followed_by_one_that_keeps_less(small, extremes, monkeypatch):
    """As where a level keeps more than was measured."""
    held = CountedMemory.held
    monkeypatch.setattr(CountedMemory, "held", lambda self: held(self) * 2 // 3)
    most, least = extremes
    limit = int(least + 0.6 * (most - least))
    fitted = fitted_in(small, pack(3, 300), ROOMY, ROOMY - limit - states_to_come(small[1]))
    assert fitted.peak_bytes <= limit
    assert peak_of(small[0], pack(3, 300)) <= limit


def test_what_does_not_fit_at_all_names_the_pack_and_the_way_out(small, extremes):
    with pytest.raises(RunError, match=r"the worst pack does not fit.*\n.*step\.max_tokens.*adapter=lora"):
        fitted_in(small, pack(3, 300), extremes[1] // 2)


def test_a_cpu_is_refused(rank):
    with pytest.raises(RunError, match=r"machine\.memory=given"):
        device_memory(rank.device)


def test_a_frozen_encoder_keeps_nothing_and_costs_nothing(rank):
    model = make_model(layers=3)
    set_trainable(model, ("projector", "language_model"))
    fitted = fitted_in(engine_of(rank, model), pack(3, 300), ROOMY)
    assert set(fitted.budget.vision_kept.values()) == {0}
    assert min(list(fitted.budget.language_kept.values())[:-1]) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="machine.device=auto would take the GPU")
def test_a_run_with_auto_gives_the_losses_of_one_without_and_the_next_needs_one_dry_run(
    demo_words, tmp_path, monkeypatch, capsys
):
    def fit_counted(engine, packed, batch, memory, **rest):
        with counted(engine, batch, ROOMY) as memory:
            return fit_memory(engine, packed, batch, memory, **rest)

    monkeypatch.setenv("VL3TRAIN_CACHE_DIR", str(tmp_path))
    room = SimpleNamespace(limit=lambda: ROOMY)  # which names what is kept
    monkeypatch.setattr(fit_run_module, "device_memory", lambda device: room)
    monkeypatch.setattr(fit_run_module, "fit_memory", fit_counted)
    words = [*demo_words, "stage=1", "machine.device=auto", "run.num_steps=2", "run.evaluate_at_end=false"]
    figures, tried = {}, {}
    for name in ("given", "auto", "again"):
        memory = "given" if name == "given" else "auto"
        cfg = load_config([*words, f"machine.memory={memory}", f"run.output_dir={tmp_path / name}"])
        train(cfg, join(cfg.machine))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        figures[name] = [json.loads(line) for line in lines]
        said = capsys.readouterr().out
        tried[name] = re.findall(
            r"memory: tried encoder \d x (\w+), language model \d x \w+.*: \d.* GiB, \d.* s", said
        )
        if name == "auto":
            assert "layer" in tried[name]
        if name != "given":
            assert re.search(
                r"memory: \d.* GiB on the worst pack \(step [12], [\d,]+ patches, [\d,]+ tokens\): encoder \d x elem",
                said,
            )
    for given, auto, again in zip(*figures.values(), strict=True):
        assert (given["loss"], given["grad_norm"]) == (auto["loss"], auto["grad_norm"])
        assert (given["loss"], given["grad_norm"]) == (again["loss"], again["grad_norm"])
        recomputed = {line["recompute_fraction"] for line in (given, auto, again)}
        assert len(recomputed) == 1
        assert 0 < recomputed.pop() < 1, "of the logits alone"
    assert len(tried["auto"]) > 3
    assert tried["again"] == ["elementwise"]


@pytest.mark.parametrize(
    ("zero_stage", "dtype", "num_micro_batches"),
    [
        (0, Dtype.float32, 2),
        pytest.param(1, Dtype.float32, 1, marks=pytest.mark.long),
        pytest.param(1, Dtype.bfloat16, 1, marks=pytest.mark.long),
        (1, Dtype.bfloat16, 2),
        pytest.param(2, Dtype.float32, 1, marks=pytest.mark.long),
        pytest.param(2, Dtype.float32, 2, marks=pytest.mark.long),
        pytest.param(3, Dtype.float32, 1, marks=pytest.mark.long),
        (3, Dtype.float32, 2),
    ],
)
def test_dry_runs_change_nothing_of_the_run(rank, zero_stage, dtype, num_micro_batches):
    model = make_model(layers=2)
    if dtype is Dtype.bfloat16:
        model = model.to(torch.bfloat16)
    worst, batches = pack(2, 100), [pack(1, 20), pack(2, 20)]
    outcomes = []
    for fits in (False, True):
        torch.manual_seed(5)
        engine, packed = engine_of(
            rank,
            copy.deepcopy(model),
            zero_stage=zero_stage,
            dtype=dtype,
            num_micro_batches=num_micro_batches,
        )
        # As dropout does in the forward pass.
        packed.model.lm_head.register_forward_pre_hook(lambda *_: torch.rand(1) and None)
        if fits:
            plan = fitted_in((engine, packed), worst, ROOMY).plan
            assert Recompute.layer not in plan.vision
        losses = []
        for _ in range(2):
            for number in range(num_micro_batches):
                output = engine.forward(batches[number])
                engine.backward(output.loss_sum / 100)
                losses.append(output.loss_sum.item())
                if number < num_micro_batches - 1:
                    engine.finish_micro_batch()
            engine.step(torch.zeros(0))
        outcomes.append((losses, engine.full_state_dict(packed.model), torch.rand(1)))
    (losses, weights, drawn), (fit_losses, fit_weights, fit_drawn) = outcomes
    assert losses == fit_losses
    assert drawn == fit_drawn
    for name, tensor in weights.items():
        assert torch.equal(tensor, fit_weights[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compile_layers", [False, True], ids=["eager", "compiled"])
def test_on_a_gpu_real_packs_stay_within_the_limit(monkeypatch, compile_layers):
    rank = join(MachineConfig())
    model = make_model(layers=6, head_dim=128, vision_head_dim=64).to("cuda", torch.bfloat16)
    engine, packed = engine_of(
        rank, model, dtype=Dtype.bfloat16, attention="torch_varlen", compile_layers=compile_layers
    )
    memory, worst = device_memory(rank.device), pack(64, 3000)
    peaks = {}
    for level in (Recompute.elementwise, Recompute.offload):
        for _ in range(2):
            memory.reset_peak()
            output = engine.forward(worst, plan=uniform_plan(level, level, (6, 6)))
            engine.backward(output.loss_sum * 0)
            del output
        peaks[level] = memory.peak()
    limit = (2 * peaks[Recompute.elementwise] + 3 * peaks[Recompute.offload]) // 5
    monkeypatch.setattr(type(memory), "limit", lambda self: limit)
    fitted = fit_memory(engine, packed, worst, memory, pack_name="the worst pack", say=lambda _: None)
    assert len(set(fitted.plan.vision + fitted.plan.language)) > 1
    for other in (worst, pack(64, 300), pack(8, 3000)):
        memory.reset_peak()
        engine.backward(engine.forward(other).loss_sum * 0)
        assert memory.peak() <= limit
