"""What a kernel warm-up runs and leaves behind, on a CPU; on a GPU that nothing is left to load."""

from __future__ import annotations

import json

import pytest
import torch

from tests.engine.memory.test_fit import engine_of, pack
from tests.model.conftest import make_model
from vl3train.config.choices import Dtype, Recompute
from vl3train.config.load import load_config
from vl3train.config.schema import MachineConfig
from vl3train.engine.loop import train
from vl3train.engine.memory import warmup
from vl3train.engine.memory.warmup import (
    LAYERS_WARMED_UP,
    plans_of_levels,
    plans_to_warm_up,
    warm_up,
    warm_up_run,
)
from vl3train.engine.monitor.console import Console
from vl3train.engine.ranks import join
from vl3train.engine.start import run as start
from vl3train.model.activations.work import uniform_plan


@pytest.fixture(scope="module")
def rank():
    return join(MachineConfig())


def record_layers(packed, monkeypatch):
    """(rows, level, positions that come out) of each layer that runs from now on."""
    run_layer, ran = packed._run_layer, []

    def recorded(body, layer, hidden, *args):
        ran.append((len(hidden), args[-2], args[-3]))
        return run_layer(body, layer, hidden, *args)

    monkeypatch.setattr(packed, "_run_layer", recorded)
    return ran


def test_layers_unlike_each_other_run_at_each_level_in_turn(rank, monkeypatch):
    engine, packed = engine_of(rank, make_model(layers=4), zero_stage=0)
    ran = record_layers(packed, monkeypatch)
    batches = [pack(3, 50), pack(2, 60), pack(1, 70), pack(0, 80)]
    warm_up(engine, batches, plans_to_warm_up(packed))
    expected = []
    for batch, level in zip(batches, ["elementwise", "mlp", "layer", "elementwise"], strict=True):
        tokens, positions = len(batch.input_ids), batch.supervised_positions
        assert 2 <= len(positions) <= tokens / 2
        expected += [
            (len(batch.pixel_values), level, None),
            (tokens, level, None),
            (tokens, level, positions),
        ]
    assert ran == expected
    ran.clear()
    engine.forward(batches[0])
    assert len(ran) == 8, "a forward pass without a plan runs all layers"


def test_levels_of_an_earlier_start_come_once_each_and_offload_as_layer():
    plans = plans_of_levels(((Recompute.mlp, Recompute.offload), (Recompute.nothing,)))
    assert [(plan.vision[0].value, plan.language[0].value) for plan in plans] == [
        ("mlp", "nothing"),
        ("layer", "nothing"),
    ]
    assert {(len(plan.vision), len(plan.language)) for plan in plans} == {LAYERS_WARMED_UP}
    assert plans_of_levels(((), ())) == []


@pytest.mark.parametrize(
    ("zero_stage", "dtype"), [(0, Dtype.float32), (1, Dtype.bfloat16), (2, Dtype.bfloat16)], ids=str
)
@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_steps_after_it_are_those_of_a_run_without(rank, zero_stage, dtype, num_micro_batches):
    packs, outcomes = [pack(3, 50), pack(0, 80), pack(2, 60)], []  # making them draws numbers
    steps = [pack(2 + number, 40) for number in range(num_micro_batches)]
    for warmed_up in (False, True):
        torch.manual_seed(0)
        model = make_model(layers=3).to(torch.bfloat16 if dtype is Dtype.bfloat16 else torch.float32)
        engine, packed = engine_of(
            rank, model, zero_stage=zero_stage, dtype=dtype, num_micro_batches=num_micro_batches
        )
        run_layer = packed._run_layer
        # What dropout would do.
        packed._run_layer = lambda *args, run_layer=run_layer: (torch.rand(1), run_layer(*args))[1]
        if warmed_up:
            warm_up(engine, packs, plans_to_warm_up(packed))
        losses = []
        for _ in range(2):
            for number, batch in enumerate(steps):
                loss = engine.forward(batch).loss_sum
                losses.append(loss.item())
                engine.backward(loss / 100)
                if number < num_micro_batches - 1:
                    engine.finish_micro_batch()
            engine.step(torch.zeros(0))
        outcomes.append((losses, engine.full_state_dict(packed.model), torch.rand(1)))
    (losses, weights, drawn), (other_losses, other_weights, other_drawn) = outcomes
    assert losses == other_losses
    assert len(set(losses)) > 1
    assert drawn == other_drawn
    for name, tensor in weights.items():
        assert torch.equal(tensor, other_weights[name]), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="machine.device=auto would take the GPU")
def test_a_run_warms_up_with_packs_of_its_plan_and_trains_as_without(
    demo_words, tmp_path, monkeypatch, capsys
):
    warmed_up = []

    def recorded(engine, batches, plans):
        batches = list(batches)
        warmed_up.append(([len(batch.pixel_values) for batch in batches], plans))
        warm_up(engine, batches, plans)

    console = Console(tmp_path, stage_name="stage", enabled=True)
    # A CPU has neither a budget to find nor kernels to load: the one stands in for the other.
    monkeypatch.setattr(start, "to_fit", lambda *run: run)
    monkeypatch.setattr(start, "fit_run", lambda run, *_: warm_up_run(*run, console))
    monkeypatch.setattr(warmup, "warm_up", recorded)
    words = [*demo_words, "stage=1", "machine.device=auto", "run.num_steps=2", "run.evaluate_at_end=false"]
    figures = []
    for name in ("given", "auto"):
        cfg = load_config([*words, f"machine.memory={name}", f"run.output_dir={tmp_path / name}"])
        train(cfg, join(cfg.machine))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        figures.append([(line["loss"], line["grad_norm"]) for line in map(json.loads, lines)])
    assert figures[0] == figures[1]
    ((patches, plans),) = warmed_up
    assert [plan.vision[0].value for plan in plans] == ["elementwise", "mlp", "layer"]
    assert patches == sorted(patches, reverse=True)
    assert len(patches) == 2 * cfg.step.global_packs, "both steps, and no two packs alike"
    said = capsys.readouterr().out
    assert f"packs of {patches[-1]:,} to {patches[0]:,} patches are loaded" in said
    assert f"0/{len(patches)} sizes of pack" in said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_after_it_a_gpu_has_nothing_to_load(rank, tmp_path):
    model = make_model(layers=3, head_dim=128, vision_head_dim=64).to("cuda", torch.bfloat16)
    engine, _ = engine_of(rank, model, dtype=Dtype.bfloat16, attention="torch_varlen")
    packs = [pack(64, 3000), pack(40, 2000), pack(7, 900)]
    level = Recompute.elementwise

    def loads(name):
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as profiler:
            for one in packs:
                engine.backward(engine.forward(one, plan=uniform_plan(level, level, (3, 3))).loss_sum * 0)
            torch.cuda.synchronize()
        profiler.export_chrome_trace(str(tmp_path / name))
        events = json.loads((tmp_path / name).read_text())["traceEvents"]
        return sum(event.get("name") == "Lazy Function Loading" for event in events)

    warm_up(engine, packs, [uniform_plan(level, level, LAYERS_WARMED_UP)])
    assert loads("after.json") == 0
