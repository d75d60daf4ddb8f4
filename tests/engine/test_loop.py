"""Whole runs on the small demo: real DeepSpeed, real shards, the real train command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import VideoLlama3ForConditionalGeneration

from tests.conftest import made_once
from tests.engine.runs import figures, run, weights
from tests.long import first_of
from vl3train.config.problems import ConfigError
from vl3train.engine import loop
from vl3train.engine.memory import host as memory_host
from vl3train.engine.ranks import OneRankError, RunError
from vl3train.model.weights.headers.manifest import write_manifest


@pytest.fixture(scope="module")
def stage1(demo_words, tmp_path_factory):
    words = [*demo_words, "stage=1", "run.num_steps=4", "run.evaluate_at_start=true"]
    return made_once(tmp_path_factory, "stage1", lambda out: run([*words, f"run.output_dir={out}"]))


def test_stage_1_trains_encoder_and_projector_and_leaves_the_language_model_alone(stage1, demo_root):
    parts = load_file(demo_root / "parts" / "language_model" / "model.safetensors")
    vision = load_file(demo_root / "parts" / "vision_encoder" / "model.safetensors")
    trained = weights(stage1)
    for name, tensor in parts.items():
        if name != "lm_head.weight":
            assert torch.equal(trained["model.language_model." + name.removeprefix("model.")], tensor), name
    name = "encoder.layers.0.mlp.fc1.weight"
    start = next(tensor for key, tensor in vision.items() if key.endswith(name))
    assert not torch.equal(trained[f"model.vision_model.{name}"], start)


def test_weights_that_cannot_be_read_give_a_message_and_no_traceback(stage1, demo_words, tmp_path):
    newest = sorted((stage1 / "checkpoints").glob("step_*"))[-1] / "weights"
    damaged = Path(shutil.copytree(newest, tmp_path / "weights"))
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"damaged weights: model\.safetensors is cut off"):
        run([*demo_words, "stage=2", f"stage.init_from={damaged}", f"run.output_dir={tmp_path / 'out'}"])


def test_a_flipped_byte_in_the_weights_of_the_stage_before_is_found(stage1, demo_words, tmp_path):
    newest = sorted((stage1 / "checkpoints").glob("step_*"))[-1]
    damaged = Path(shutil.copytree(newest, tmp_path / newest.name))
    file = damaged / "weights" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        RunError, match=r"weights is damaged: weights/model\.safetensors is not what was written"
    ):
        run([*demo_words, "stage=2", f"stage.init_from={damaged}", f"run.output_dir={tmp_path / 'out'}"])


def test_it_evaluates_held_out_samples_before_and_after(stage1):
    lines = [json.loads(line) for line in (stage1 / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"], line["when"]) for line in lines] == [(1, 0, "start"), (1, 4, "end")]
    assert all(
        0 <= row["accuracy"] <= 1 and row["samples"] > 0 for line in lines for row in line["sources"].values()
    )


def test_a_finished_run_started_again_does_nothing(stage1, demo_words):
    before = {path: path.stat().st_mtime_ns for path in (stage1 / "checkpoints").rglob("*") if path.is_file()}
    run([*demo_words, "stage=1", f"run.output_dir={stage1}", "run.num_steps=4"])
    after = {path: path.stat().st_mtime_ns for path in (stage1 / "checkpoints").rglob("*") if path.is_file()}
    assert before == after
    assert len(figures(stage1)) == 4


ON_HOST = ["machine.dtype=bfloat16", "machine.offload_optimizer=true"]
SPLIT = [*ON_HOST, "optim.master_dtype=split"]
NO_MASTERS = ["machine.dtype=bfloat16", "optim.state_dtype=bfloat16", "optim.master_dtype=bfloat16"]


def test_moments_that_the_host_cannot_hold_are_refused_before_the_first_step(
    stage1, demo_words, tmp_path, monkeypatch
):
    monkeypatch.setattr(memory_host, "free_in_groups", lambda: 2**20)
    start = f"stage.init_from={stage1 / 'checkpoints/step_00000004/weights'}"
    words = [*demo_words, "stage=3", start, f"run.output_dir={tmp_path / 'out'}", "run.num_steps=1"]
    words += ["run.evaluate_at_end=false"]
    with pytest.raises(
        RunError,
        match=r"AdamW's moments \(machine\.offload_optimizer=true\) need .* are left of this run's limit: set mach",
    ):
        run([*words, *ON_HOST])
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    run(words)  # without it the host holds none


def test_the_message_of_a_full_gpu_names_the_packs_and_what_makes_room(
    stage1, demo_words, tmp_path, monkeypatch
):
    """No GPU is here to be filled: the step raises what torch would."""
    steps, step = [], loop.train_step

    def full(*args, **settings):
        steps.append(1)
        if len(steps) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nOf the memory ...")
        return step(*args, **settings)

    monkeypatch.setattr(loop, "train_step", full)
    start = f"stage.init_from={stage1 / 'checkpoints/step_00000004/weights'}"
    words = [*demo_words, "stage=3", start, f"run.output_dir={tmp_path / 'out'}", "run.num_steps=3"]
    with pytest.raises(OneRankError) as error:
        run(words)
    text = str(error.value)
    assert text.startswith(
        "rank 0: out of memory while step 2 ran: CUDA out of memory. Tried to allocate 2 GiB.\n"
    )
    assert text.count(" tokens and ") == 2, "of both packs"
    for way_out in (
        "machine.memory=auto",
        "machine.recompute_vision=layer",
        "machine.dtype=bfloat16",
        "adapter=lora",
    ):
        assert f"\n  {way_out}" in text
    assert "Of the memory" not in text
    assert "offload_optimizer" not in text, "it needs bfloat16"


@pytest.mark.parametrize(
    "optim",
    [
        pytest.param([], id="float32 states"),
        pytest.param(["optim.state_dtype=bfloat16"], id="bfloat16 states", marks=pytest.mark.long),
        pytest.param(NO_MASTERS, id="no masters and bfloat16 states", marks=pytest.mark.long),
        pytest.param(ON_HOST, id="states on the host", marks=pytest.mark.long),
        pytest.param(SPLIT, id="split masters and states on the host", marks=pytest.mark.long),
    ],
)
def test_the_next_stage_starts_from_it_and_a_stopped_run_resumes_bitwise(stage1, demo_words, tmp_path, optim):
    words = [
        *demo_words,
        "stage=3",
        f"stage.init_from={stage1 / 'checkpoints/step_00000004/weights'}",
        "run.evaluate_at_end=false",
        *optim,
    ]
    straight = run([*words, f"run.output_dir={tmp_path / 'straight'}", "run.num_steps=3"])
    stopped = [*words, f"run.output_dir={tmp_path / 'stopped'}", "run.num_steps=3"]
    run([*stopped, "run.stop_after_steps=1"])
    resumed = run(stopped)
    assert figures(resumed, "learning_rates") == figures(straight, "learning_rates")
    for name, tensor in weights(straight).items():
        assert torch.equal(weights(resumed)[name], tensor), name
    # The two newest, and the oldest: none is old enough yet to go back to after a row of bad steps.
    assert sorted(p.name for p in (resumed / "checkpoints").glob("step_*")) == [
        "step_00000001",
        "step_00000002",
        "step_00000003",
    ]


def test_a_run_with_split_masters_goes_on_with_no_others(stage1, demo_words, tmp_path):
    start = f"stage.init_from={stage1 / 'checkpoints/step_00000004/weights'}"
    words = [*demo_words, "stage=3", start, *SPLIT, f"run.output_dir={tmp_path}", "run.num_steps=2"]
    run([*words, "run.stop_after_steps=1"])
    message = r"optim\.master_dtype: the checkpoint has 'split', this run has 'float32'\nEither go back"
    with pytest.raises(RunError, match=message):
        run([*words, "optim.master_dtype=float32"])


def test_layers_that_are_not_compiled_take_no_time_to_compile(stage1):
    assert {line[4:] for line in figures(stage1, "compile_seconds", "recompiles")} == {("0.0", "0")}


def test_another_plan_or_model_is_refused_with_what_differs(stage1, demo_words):
    words = [*demo_words, "stage=1", f"run.output_dir={stage1}", "run.num_steps=6"]
    with pytest.raises(RunError, match=r"step\.max_tokens: the checkpoint has 512, this run has 600"):
        run([*words, "step.max_tokens=600"])
    with pytest.raises(
        RunError, match=r"  machine\.dtype: the checkpoint has 'float32', this run has 'bfloat16'"
    ):
        run([*words, "machine.dtype=bfloat16", "machine.zero_stage=2"])
    with pytest.raises(RunError, match="cannot be resumed") as caught:
        run([*words, "run.num_steps=3", "optim.weight_decay=0.1"])
    assert "the run has 3 steps, and the checkpoint has done 4; set run.num_steps=4 or more" in str(
        caught.value
    )
    assert "optim.weight_decay=0.1, and the checkpoint has 0:" in str(caught.value)


@pytest.mark.parametrize("machine", first_of(["machine.dtype=bfloat16"], [], ["machine.zero_stage=3"]))
def test_another_rate_is_taken_by_a_run_that_goes_on(demo_words, tmp_path, machine):
    words = [*demo_words, *machine, "stage=1", f"run.output_dir={tmp_path}", "run.num_steps=2"]
    words += ["run.evaluate_at_end=false", "optim.schedule=constant"]
    run([*words, "run.stop_after_steps=1"])
    run([*words, "model.learning_rates={vision_encoder: 3e-4, projector: 5e-4}"])
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["learning_rates"] == {"vision_encoder": 3e-4, "projector": 5e-4}


def test_what_a_run_without_a_checkpoint_left_is_not_taken(stage1, demo_words, tmp_path):
    """Its base and processor may be those of another model or stage."""
    words = [*demo_words, f"run.output_dir={tmp_path}", "run.num_steps=1", "run.evaluate_at_end=false"]
    words += ["adapter=lora", "adapter.rank=2", f"stage.init_from={stage1}"]
    for name in ("base", "processor"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text("of another run")
    with pytest.raises(RunError, match=r"holds processor and base, which a run writes, and no config\.yaml"):
        run([*words, "stage=2"])
    assert (tmp_path / "base" / "tokenizer.json").read_text() == "of another run", (
        "it may be somebody's only copy"
    )
    (tmp_path / "config.yaml").write_text("{stage: {}, run: {}, machine: {}}")  # what a run leaves first
    run([*words, "stage=2"])
    start = VideoLlama3ForConditionalGeneration.from_pretrained(stage1 / "checkpoints/step_00000004/weights")
    base = VideoLlama3ForConditionalGeneration.from_pretrained(tmp_path / "base").state_dict()
    assert all(torch.equal(base[name], tensor) for name, tensor in start.state_dict().items())
    assert (tmp_path / "processor" / "processor_config.json").is_file()


@pytest.mark.parametrize(
    "machine", first_of(["machine.zero_stage=0"], ["machine.dtype=bfloat16"], ["machine.zero_stage=3"])
)
def test_every_zero_stage_and_dtype_trains_saves_and_resumes(stage1, demo_words, tmp_path, machine):
    words = [*demo_words, *machine, "stage=2", f"stage.init_from={stage1}", f"run.output_dir={tmp_path}"]
    words += ["run.num_steps=3", "run.evaluate_at_end=false", "machine.recompute_language=layer"]
    words += ["machine.recompute_vision=" + ("layer" if "machine.zero_stage=3" in machine else "mlp")]
    run([*words, "run.stop_after_steps=1"])
    run(words)
    losses = [float(loss) for _, loss, *_ in figures(tmp_path)]
    assert len(losses) == 3
    assert all(loss > 0 for loss in losses)
    dtype = {tensor.dtype for tensor in weights(tmp_path).values()}
    assert dtype == {torch.bfloat16 if "bfloat16" in machine[0] else torch.float32}


@pytest.mark.parametrize("zero_stage", first_of(1, 3))
def test_lora_trains_packed_is_saved_alone_and_resumes(stage1, demo_words, tmp_path, zero_stage):
    words = [*demo_words, "stage=3", f"stage.init_from={stage1 / 'checkpoints/step_00000004/weights'}"]
    words += [
        "adapter=lora",
        "adapter.rank=4",
        "adapter.modules_to_save=[projector]",
        f"machine.zero_stage={zero_stage}",
        "run.evaluate_at_end=false",
    ]
    straight = run([*words, f"run.output_dir={tmp_path / 'straight'}", "run.num_steps=4"])
    stopped = [*words, f"run.output_dir={tmp_path / 'stopped'}", "run.num_steps=4"]
    run([*stopped, "run.stop_after_steps=2"])
    resumed = run(stopped)
    assert figures(resumed) == figures(straight)
    checkpoint = straight / "checkpoints" / "step_00000004"
    assert not (checkpoint / "weights").exists()
    named = json.loads((checkpoint / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]
    assert Path(named) == straight / "base"
    base = VideoLlama3ForConditionalGeneration.from_pretrained(straight / "base")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, checkpoint / "adapter").merge_and_unload().state_dict()
    moved = {name for name, tensor in merged.items() if not torch.equal(tensor, before[name])}
    assert any("language_model" in name for name in moved)
    assert any("projector" in name for name in moved), (
        "parts beside the adapters train in full and are saved too"
    )
    assert not any("vision_model" in name for name in moved), "nobody named it"


@pytest.mark.parametrize("init", first_of("default", "pissa"))
def test_adapters_on_4_bit_weights_resume_bitwise_and_the_next_stage_starts_from_them(
    stage1, demo_words, tmp_path, init, capsys
):
    words = [*demo_words, "stage=3", f"stage.init_from={stage1 / 'checkpoints/step_00000004/weights'}"]
    words += ["adapter=lora", "adapter.rank=8", f"adapter.init={init}", "adapter.base_4bit=nf4"]
    words += [
        "machine.dtype=bfloat16",
        "run.evaluate_at_end=false",
        "run.num_steps=3",
        "optim.warmup_fraction=0",
    ]
    straight = run([*words, f"run.output_dir={tmp_path / 'straight'}"])
    stopped = [*words, f"run.output_dir={tmp_path / 'stopped'}"]
    run([*stopped, "run.stop_after_steps=2"])
    assert figures(run(stopped)) == figures(straight)
    checkpoint = straight / "checkpoints" / "step_00000003"
    held = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    assert held < (straight / "base" / "model.safetensors").stat().st_size, "no base, whole or in 4 bits"
    for damaged in (
        1,
        2,
    ):  # other weights than those it was trained on: told by the manifest, and by the digest
        base = load_file(tmp_path / "stopped" / "base" / "model.safetensors")
        base["model.language_model.layers.0.mlp.up_proj.weight"][0] += 1
        save_file(base, tmp_path / "stopped" / "base" / "model.safetensors", metadata={"format": "pt"})
        if damaged == 2:
            write_manifest(tmp_path / "stopped" / "base")
        with pytest.raises(
            RunError, match=r"stopped/base is damaged: .*adapters were trained on exactly"
        ) as told:
            run([*stopped, "run.num_steps=4"])
        assert ("its digest differs" if damaged == 1 else "is not that of the base that") in str(told.value)
    capsys.readouterr()
    start = [
        *demo_words,
        "stage=4",
        f"stage.init_from={straight}",
        "run.num_steps=1",
        "run.evaluate_at_end=false",
    ]
    after = run([*start, f"run.output_dir={tmp_path / 'after'}"])
    assert "starts from the adapters in" in capsys.readouterr().out
    assert (
        weights(after).keys()
        == load_file(stage1 / "checkpoints/step_00000004/weights/model.safetensors").keys()
    )


@pytest.mark.long
def test_a_start_is_the_base_with_its_adapters_merged(stage1, demo_words, tmp_path):
    """Told apart from the base alone by what both answer."""
    words = [*demo_words, "stage=3", f"stage.init_from={stage1 / 'checkpoints/step_00000004/weights'}"]
    words += ["adapter=lora", "adapter.rank=4", "adapter.learning_rate=0.1", "run.evaluate_at_end=false"]
    lora = run([*words, f"run.output_dir={tmp_path / 'lora'}", "run.num_steps=2", "optim.warmup_fraction=0"])
    start = [
        *demo_words,
        "stage=4",
        f"stage.init_from={lora}",
        "run.evaluate_at_end=false",
        "run.num_steps=1",
    ]
    rate = "stage.learning_rates={projector: 1e-20}"  # what it saves is then what it started from
    found = weights(run([*start, "model.learning_rates={}", rate, f"run.output_dir={tmp_path / 'next'}"]))
    base = VideoLlama3ForConditionalGeneration.from_pretrained(lora / "base")
    adapter = lora / "checkpoints" / "step_00000002" / "adapter"
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=1e-7)
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"?")
    with pytest.raises(RunError, match=r"adapter/adapter_model\.safetensors is not what was written"):
        run([*start, f"run.output_dir={tmp_path / 'damaged'}"])
    file.write_bytes(whole)
    with pytest.raises(RunError, match=r"can start from these weights: stage\.init_from=.*step_00000002\)"):
        run([*words, f"run.output_dir={lora}", "run.num_steps=3", "adapter.alpha=5"])


def test_stage_2_of_a_larger_model_starts_with_the_encoder_that_a_smaller_one_trained(
    stage1, demo_root, demo_words, tmp_path
):
    """The paper's 7B: no stage 1 of its own."""
    words = [*demo_words, "stage=2", f"model.vision_encoder_from={stage1}", "run.evaluate_at_end=false"]
    words += ["run.num_steps=1", "model.learning_rates={}", "stage.learning_rates={projector: 1e-20}"]
    found = weights(run([*words, f"run.output_dir={tmp_path / 'out'}"]))
    tuned = weights(stage1)
    language = load_file(demo_root / "parts" / "language_model" / "model.safetensors")
    assert found.keys() == tuned.keys()
    for name, tensor in found.items():
        if "vision_model" in name:
            assert torch.equal(tensor, tuned[name]), name
        elif "language_model" in name:
            assert torch.equal(tensor, language[name.replace("model.language_model", "model")]), name
    assert not torch.equal(
        found["model.projector.readout.0.weight"], tuned["model.projector.readout.0.weight"]
    )
