"""Each rule refuses what it is for, names key and way out, and lets the published configs through."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.config.conftest import write_config_json, write_run_config
from vl3train.config.checks.ranges import RANGES
from vl3train.config.checks.start import starts_from
from vl3train.config.load import read_config
from vl3train.config.paths import resolve_start, resolve_weights
from vl3train.config.rules import effective_learning_rates, problems
from vl3train.config.schema import TrainConfig


def config(*overrides: str) -> TrainConfig:
    cfg, found = read_config(["machine=one_node", *overrides])
    assert cfg is not None
    assert found == []
    return cfg


def keys(*overrides: str) -> list[str]:
    return [problem.key for problem in problems(config(*overrides))]


def only_problem(*overrides: str) -> str:
    [problem] = problems(config(*overrides))
    return str(problem)


def test_the_original_frame_sampling_has_no_fewest_frames():
    found = problems(config("stage=1", "data.frame_sampling=original", "data.min_frames=4"))
    assert "the original code has no fewest frames" in str(
        next(p for p in found if p.key == "data.min_frames")
    )


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("step.global_packs=12", "step.global_packs"),
        ("data.max_visual_tokens=16384", "data.max_visual_tokens"),
        ("step.max_patches=40959", "step.max_patches"),
        ("run.silence_seconds=3600", "run.collective_timeout_seconds"),
        ("data.min_frames=181", "data.min_frames"),
        ("data.image_min_pixels=4000000", "data.image_min_pixels"),
        ("stage.learning_rates.head=1e-5", "stage.learning_rates.head"),
        ("model.learning_rates.projector=-1e-3", "model.learning_rates.projector"),
        ("stage.learning_rates={}", "stage.learning_rates"),
        ("stage.init_from=checkpoint", "stage.init_from"),
        ("model.vision_encoder_from=null", "model.vision_encoder_from"),
        ("model.language_model_from=data/nothing", "model.language_model_from"),
        ("model.language_model_from=data/parts/vision_encoder", "model.language_model_from"),
        ("model.tokenizer_from=data", "model.tokenizer_from"),
        ("machine.zero_stage=0", "machine.zero_stage"),
        ("machine.zero_stage=4", "machine.zero_stage"),
        ("data.root=elsewhere", "data.root"),
        ("stage.image_merge_size=0", "stage.image_merge_size"),
        ("optim.warmup_fraction=1", "optim.warmup_fraction"),
        ("run.num_steps=0", "run.num_steps"),
        ("run.num_epochs=0", "run.num_epochs"),
        ("step.fill=1.01", "step.fill"),
    ],
)
def test_one_mistake_is_one_problem(workplace: Path, override: str, key: str):
    assert keys("stage=1") == []
    assert keys("stage=1", override) == [key]


def test_the_problem_names_value_and_way_out(workplace: Path):
    text = only_problem("stage=1", "step.global_packs=12")
    assert text == "step.global_packs=12: does not divide over machine.dp_size=8 ranks; take 8 or 16"


def test_optimizer_state_that_is_rounded_is_partitioned(workplace: Path):
    words = ["stage=1", "machine.zero_stage=0", "machine.dtype=float32"]
    assert keys(*words) == []
    assert keys(*words, "optim.state_dtype=bfloat16") == ["optim.state_dtype"]


def test_weights_without_masters_name_all_that_they_need(workplace: Path):
    no_masters = "optim.master_dtype=bfloat16"
    assert keys("stage=1", no_masters, "optim.state_dtype=bfloat16") == []
    text = only_problem("stage=1", no_masters, "machine.zero_stage=2", "machine.dtype=float32")
    lacking = "set machine.dtype=bfloat16 and machine.zero_stage=1 and optim.state_dtype=bfloat16"
    assert text.startswith("optim.master_dtype=bfloat16: ")
    assert text.endswith(f"{lacking}, or optim.master_dtype=float32")


def test_an_offloaded_optimizer_names_all_that_it_needs(workplace: Path):
    on_host = "machine.offload_optimizer=true"
    assert keys("stage=1", on_host) == []
    text = only_problem("stage=1", on_host, "machine.zero_stage=2", "optim.state_dtype=bfloat16")
    assert text.startswith("machine.offload_optimizer=true: ")
    assert text.endswith(
        "set machine.zero_stage=1 and optim.state_dtype=float32, or machine.offload_optimizer=false"
    )
    assert keys("stage=1", on_host, "machine.dtype=float32") == ["machine.offload_optimizer"]


def test_split_masters_need_an_offloaded_optimizer(workplace: Path):
    split = "optim.master_dtype=split"
    assert keys("stage=1", split, "machine.offload_optimizer=true") == []
    text = only_problem("stage=1", split)
    assert text.startswith("optim.master_dtype=split: ")
    assert text.endswith("set machine.offload_optimizer=true, or optim.master_dtype=float32")
    both = keys("stage=1", split, "machine.offload_optimizer=true", "machine.zero_stage=2")
    assert both == ["machine.offload_optimizer"]


def test_five_mistakes_are_five_problems(workplace: Path):
    assert keys(
        "stage=2", "step.global_packs=7", "optim.beta1=1", "machine.zero_stage=0", "data.root=elsewhere"
    ) == ["optim.beta1", "stage.init_from", "step.global_packs", "machine.zero_stage", "data.root"]


@pytest.mark.parametrize("key", sorted(RANGES))
def test_no_number_may_be_infinite_or_far_below_zero(workplace: Path, key: str):
    cfg = config("stage=1")
    section, option = key.split(".")
    for value in (-5, float("inf"), float("nan")):
        object.__setattr__(getattr(cfg, section), option, value)
        assert key in [problem.key for problem in problems(cfg)]


def test_kernels_and_number_formats(workplace: Path):
    on_cpu = ("stage=1", "machine=cpu")
    assert keys(*on_cpu) == []
    assert keys(*on_cpu, "machine.attention=flash_attn") == ["machine.attention", "machine.attention"]
    assert keys("stage=1", "machine.dtype=float32", "machine.attention=torch_varlen") == ["machine.attention"]
    assert keys("stage=1", "machine.dtype=float32", "machine.zero_stage=0") == []
    quack = ("machine.gemm_backend=quack", "machine.compile_layers=true")
    assert keys("stage=1", *quack) == []
    assert keys("stage=1", quack[0]) == ["machine.gemm_backend"]
    assert keys(*on_cpu, *quack) == ["machine.gemm_backend", "machine.gemm_backend"]


def test_what_zero_3_and_adapters_cannot_do(workplace: Path):
    zero_3 = ("stage=1", "machine.zero_stage=3")
    assert keys(*zero_3, "machine.recompute_vision=layer", "machine.recompute_language=nothing") == []
    assert keys(*zero_3, "machine.recompute_language=mlp") == ["machine.recompute_language"]
    assert keys(*zero_3, "machine.recompute_language=mlp", "machine.memory=auto") == []  # it is not read then
    assert keys(*zero_3, "machine.recompute_vision=mlp", "machine.compile_layers=true") == []
    compiled = (
        "stage=3",
        "stage.init_from=x",
        "adapter=lora",
        "machine.compile_layers=true",
        "adapter.dropout=0.05",
    )
    assert "machine.compile_layers" in keys(*compiled)
    assert "machine.compile_layers" not in keys(*compiled, "adapter.dropout=0")


def test_later_stages_need_a_start(workplace: Path):
    assert "has nothing to start from" in only_problem("stage=2")
    assert "no such folder" in only_problem("stage=2", "stage.init_from=data/nothing")
    assert "hf download org/name" in only_problem("stage=2", "stage.init_from=org/name")
    assert "holds a qwen2 model" in only_problem("stage=2", "stage.init_from=data/parts/language_model")
    assert "no config.json" in only_problem("stage=2", "stage.init_from=data")
    assert keys("stage=2", "stage.init_from=checkpoint") == []


def make_run(folder: Path, *overrides: str) -> Path:
    """A run's output folder as the engine leaves it, with one checkpoint."""
    write_config_json(folder / "checkpoints" / "step_00000010" / "weights", "video_llama_3")
    (folder / "checkpoints" / "latest").write_text("step_00000010")
    write_run_config(config(*overrides), folder)
    (folder / "finished.json").write_text("{}")
    return folder


def test_a_run_folder_stands_for_its_latest_weights(workplace: Path):
    run = make_run(workplace / "runs" / "one", "stage=1")
    weights = run / "checkpoints" / "step_00000010" / "weights"
    assert resolve_weights(run) == weights
    assert resolve_weights(weights.parent) == weights
    assert resolve_weights(weights) == weights
    started = config("stage=2", f"stage.init_from={run}")
    assert problems(started) == []
    assert starts_from(started) == f"1_encoder_adaptation in {run}, step_00000010"
    (run / "finished.json").unlink()
    found = only_problem("stage=2", f"stage.init_from={run}")
    assert "not finished" in found
    assert str(weights.parent) in found
    assert keys("stage=2", f"stage.init_from={weights.parent}") == []
    assert "not finished" in only_problem("stage=2", f"model.vision_encoder_from={run}")
    assert keys("stage=2", f"model.vision_encoder_from={weights.parent}") == []
    (run / "checkpoints" / "latest").unlink()
    assert "no complete checkpoint" in only_problem("stage=2", f"stage.init_from={run}")


def test_a_stage_is_not_skipped_by_mistake(workplace: Path):
    run = make_run(workplace / "runs" / "one", "stage=1")
    assert "stage 2 comes between" in only_problem("stage=3", f"stage.init_from={run}")
    weights = resolve_weights(run)
    assert keys("stage=3", f"stage.init_from={weights}") == []
    assert "is the run.output_dir of this run" in only_problem(
        "stage=2", f"stage.init_from={run}", f"run.output_dir={run}"
    )


def test_a_run_with_adapters_is_a_start_with_its_base(workplace: Path):
    run = make_run(workplace / "runs" / "lora", "stage=1")
    weights = resolve_weights(run)
    adapter = weights.with_name("adapter")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    weights.rename(run / "base")
    assert resolve_start(run) == (run / "base", adapter)
    assert keys("stage=2", f"stage.init_from={run}") == []
    assert "its adapters merged in float32" in starts_from(config("stage=2", f"stage.init_from={run}"))
    assert keys("stage=2", f"stage.init_from={adapter}") == []
    alone = Path(shutil.copytree(adapter, workplace / "alone"))
    assert "weights of elsewhere, which is no folder here" in only_problem(
        "stage=2", f"stage.init_from={alone}"
    )
    (run / "base").rename(run / "moved")
    assert f"{run / 'base'} is missing" in only_problem("stage=2", f"stage.init_from={run}")


LORA = ("stage=2", "stage.init_from=checkpoint", "adapter=lora")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("adapter.parts=[projector,language_model]", "adapter.parts"),
        ("adapter.parts=[]", "adapter.parts"),
        ("adapter.parts=[vision_encoder] stage.learning_rates.language_model=1e-5", "adapter.parts"),
        ("adapter.rank=0", "adapter.rank"),
        ("adapter.part_ranks={vision_encoder: 8}", "adapter.part_ranks.vision_encoder"),
        ("adapter.part_ranks={language_model: 0}", "adapter.part_ranks.language_model"),
        ("adapter.part_alphas={language_model: -1}", "adapter.part_alphas.language_model"),
        ("adapter.target_modules=[qproj]", "adapter.target_modules"),
        ("adapter.target_modules=[fc1]", "adapter.target_modules"),
        ("adapter.target_modules=['(']", "adapter.target_modules"),
        ("adapter.target_modules=[]", "adapter.target_modules"),
        ("adapter.modules_to_save=[language_model]", "adapter.modules_to_save"),
        ("adapter.init=pissa adapter.use_dora=true", "adapter.init"),
        ("adapter.init=pissa machine.zero_stage=3", "adapter.init"),
        ("adapter.use_dora=true machine.zero_stage=3", "adapter.use_dora"),
        ("adapter.base_4bit=nf4 machine.zero_stage=3", "adapter.base_4bit"),
        ("adapter.base_4bit=nf4 adapter.use_dora=true", "adapter.base_4bit"),
        ("adapter.base_4bit_parts=[projector] adapter.base_4bit=nf4", "adapter.base_4bit_parts"),
        (
            "adapter.base_4bit=nf4 adapter.base_4bit_parts=[vision_encoder] adapter.modules_to_save=[vision_encoder]",
            "adapter.base_4bit_parts",
        ),
    ],
)
def test_adapters_that_cannot_be(workplace: Path, words: str, key: str):
    assert keys(*LORA, *re.split(" (?=[a-z_]+[.])", words)) == [key]


def test_adapters(workplace: Path):
    assert keys(*LORA) == []
    assert keys("stage=1", "adapter=lora") == []
    assert keys("stage=1", "adapter=lora", "adapter.learning_rate=null") == ["adapter.learning_rate"]
    assert "did you mean q_proj?" in only_problem(*LORA, "adapter.target_modules=[qproj]")
    assert keys(*LORA, "adapter.target_modules=[q_proj, '.*mlp.*']") == []
    assert (
        keys(*LORA, "adapter.base_4bit=nf4", "adapter.init=pissa", "adapter.part_ranks={language_model: 8}")
        == []
    )


def test_the_models_rate_replaces_the_stages_and_trains_no_other_part(workplace: Path):
    cfg = config("stage=1", "model.learning_rates={projector: 5e-3, language_model: 1e-3}")
    assert effective_learning_rates(cfg) == {"vision_encoder": 1e-5, "projector": 5e-3}


def test_memory_auto_is_refused_on_a_cpu(workplace: Path):
    text = only_problem("stage=1", "machine.memory=auto", "machine.device=cpu")
    assert text == "machine.memory=auto: auto measures a GPU, and machine.device=cpu; use given"


def test_an_output_folder_below_a_file_is_found_before_the_launch(tmp_path):
    (tmp_path / "file").touch()
    text = next(
        str(problem)
        for problem in problems(config("stage=1", f"run.output_dir={tmp_path}/file/sub/run"))
        if problem.key == "run.output_dir"
    )
    assert f"cannot be made: {tmp_path / 'file'} is a file; name a folder" in text


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("{run}", "lies in run.output_dir"),
        ("file://{run}/copy", "lies in run.output_dir"),
        ("{run}/../mine/copy", "lies in run.output_dir"),
        ("' '", "is empty"),
        ("memory://copy", "is the memory of this process"),
        ("s3:/bucket/copy", "is no address"),
        ("{run}-copy", None),
        ("{run}/..", None),
        ("s3://bucket/copy", None),
        ("null", None),
    ],
)
def test_a_run_is_not_copied_into_itself_or_to_a_place_that_is_none(tmp_path, place, said):
    words = f"run.output_dir={tmp_path}/mine", f"run.upload_to={place.format(run=tmp_path / 'mine')}"
    found = [str(one) for one in problems(config("stage=1", *words)) if one.key == "run.upload_to"]
    assert [said in text for text in found] == ([] if said is None else [True])
