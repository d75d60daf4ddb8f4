"""Reading a config: what wins over what, and mistakes told all at once in plain words."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.config.conftest import write_run_config
from vl3train.config.choices import Attention, Dtype
from vl3train.config.input.groups import group_choices
from vl3train.config.input.options import OPTIONS, RENAMED
from vl3train.config.load import load_config, read_config
from vl3train.config.plain import as_plain
from vl3train.config.problems import ConfigError
from vl3train.config.schema import TrainConfig

STAGE_1 = ["stage=1_encoder_adaptation"]


def read(*overrides: str, **options: object) -> TrainConfig:
    cfg, found = read_config(list(overrides), **options)  # type: ignore[arg-type]
    assert found == []
    assert cfg is not None
    return cfg


def told(*overrides: str, **options: object) -> list[str]:
    return [str(problem) for problem in read_config(list(overrides), **options)[1]]  # type: ignore[arg-type]


def test_a_config_is_typed_objects(workplace: Path):
    cfg = load_config([*STAGE_1, "machine=cpu", "machine.attention=reference", "run.num_steps=3"])
    assert cfg.machine.dtype is Dtype.float32
    assert cfg.machine.attention is Attention.reference
    assert cfg.stage.learning_rates == {"vision_encoder": 1e-5, "projector": 1e-3}
    assert cfg.run.num_steps == 3
    assert cfg.run.output_dir == "runs/2b/1_encoder_adaptation"


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_stage_can_be_called_by_its_number(number: int):
    assert read(f"stage={number}").stage.number == number


def test_the_demo_takes_the_recipe_of_the_stage():
    assert read("stage=3", "data=demo").data.recipe == "demo_stage3"


def test_the_launch_counts_the_ranks():
    assert read(*STAGE_1, dp_size=4).machine.dp_size == 4
    [problem] = told(*STAGE_1, "machine.dp_size=2", dp_size=4)
    assert problem.startswith("machine.dp_size=2: the launch has 4 ranks")


def test_a_dict_is_replaced_and_its_entries_can_be_set_and_removed():
    one = read("stage=2", "stage.learning_rates={projector: 1e-4}")
    assert one.stage.learning_rates == {"projector": 1e-4}
    frozen = read("stage=2", "~stage.learning_rates.language_model", "stage.learning_rates.projector=2e-5")
    assert frozen.stage.learning_rates == {"vision_encoder": 2e-6, "projector": 2e-5}
    assert read("stage=2", "model.learning_rates.projector=1").model.learning_rates == {"projector": 1.0}


def test_a_file_lies_over_the_groups_and_under_the_command_line(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "stage: 2\nmodel: 7b\nstep: {max_tokens: 4096, global_packs: 32}\nmachine: {zero_stage: 3}\n"
    )
    cfg = read("step.global_packs=64", config_file=file)
    assert (cfg.stage.number, cfg.model.name, cfg.machine.zero_stage) == (2, "7b", 3)
    assert (cfg.step.max_tokens, cfg.step.global_packs) == (4096, 64)
    assert read("stage=3", config_file=file).stage.number == 3


def test_groups_of_the_users_own(tmp_path: Path):
    (tmp_path / "stage").mkdir()
    file = tmp_path / "stage" / "5_mine.yaml"
    file.write_text("number: 4\nname: 5_mine\nrecipe: stage4\nlearning_rates: {projector: 1e-3}\n")
    assert read("stage=5", config_dir=tmp_path).stage.name == "5_mine"
    assert "5_mine" in group_choices("stage", tmp_path)
    file.write_text("number: 4\nname: 5_mine\nrecipe: stage4\nlearning_rats: {projector: 1e-3}\n")
    [problem] = told("stage=5", config_dir=tmp_path)
    assert problem.startswith("stage.learning_rats: In 'stage/5_mine'")
    assert problem.endswith("did you mean stage.learning_rates?")
    file.write_text("number: [")
    assert "5_mine.yaml" in told("stage=5", config_dir=tmp_path)[0]


def test_a_file_that_would_hide_behind_a_shipped_one_is_refused(tmp_path: Path):
    (tmp_path / "machine").mkdir()
    (tmp_path / "machine" / "cpu.yaml").write_text("dp_size: 7\n")
    assert "give yours another name" in told("stage=1", "machine=cpu", config_dir=tmp_path)[0]


def test_a_saved_config_is_read_back_whole(workplace: Path):
    cfg = read("stage=4", "model=7b", "adapter=lora", "run.num_steps=7", "tracking=wandb")
    assert as_plain(read(config_file=write_run_config(cfg, workplace))) == as_plain(cfg)


HUGE = "1" + "0" * 5000  # Python reads no number of so many digits


def test_mistakes_are_told_all_at_once_with_what_exists():
    found = told(
        "stage=1",
        "modl=7b",
        "step.max_tokns=5",
        "max_frames=9",
        "step.max_tokens=many",
        "machine.attention=flash",
        "run.num_steps=1.5",
        "optim.beta1",
        f"run.save_steps={HUGE}",
        "model=dbug",
        "run.seed=1,2",
        "~step.fill",
    )
    expected = [
        "modl=7b: no such option; did you mean model?",
        "step.max_tokns=5: no such option; did you mean step.max_tokens?",
        "max_frames=9: no such option; did you mean data.max_frames?",
        "step.max_tokens=many: is of the wrong kind; it takes a whole number",
        "machine.attention=flash: no such choice; there are: auto, flash_attn_4,",
        "run.num_steps=1.5: is of the wrong kind; it takes a whole number, or null",
        "optim.beta1: is not key=value",
        f"run.save_steps={HUGE}: is not key=value",
        "model=dbug: no such choice; did you mean debug? the choices are 2b, 7b, debug",
        "run.seed=1,2: is several values; give one",
        "~step.fill: only an entry of a dict",
    ]
    for start in expected:
        assert any(problem.startswith(start) for problem in found), (start, found)
    assert len(found) == len(expected)


def test_a_path_that_no_option_has_is_told_which_could(tmp_path: Path):
    recipe = tmp_path / "mine.yaml"
    recipe.touch()
    folder, file = told("stage=1", str(tmp_path), str(recipe))
    assert folder.startswith(f"{tmp_path}: is not key=value; say what it is: data.root={tmp_path} has")
    assert file.startswith(f"{recipe}: is not key=value; say what it is: data.recipe={recipe} names")
    [no_path] = told("stage=1", "a(" * 200)
    assert "is not key=value; quote what the shell" in no_path


def test_all_that_must_be_set_is_asked_for_at_once(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("stage: {number: 2}\n")
    keys = {problem.key for problem in read_config([], config_file=file)[1]}
    assert {"stage.name", "stage.recipe", "stage.learning_rates"} <= keys


def test_a_run_without_a_stage_is_told_the_stages():
    [problem] = told()
    assert "no stage is chosen" in problem
    assert "4_video_finetuning" in problem


def test_load_config_refuses_what_the_rules_refuse(workplace: Path):
    with pytest.raises(ConfigError) as refused:
        load_config(["stage=2", "step.global_packs=7", "machine=cpu", "step.fill=x"])
    assert [problem.key for problem in refused.value.problems] == [
        "step.fill",
        "stage.init_from",
        "step.global_packs",
    ]
    assert str(refused.value).splitlines()[0] == "3 problems in the configuration:"


def test_reading_a_config_is_fast_and_needs_no_torch():
    code = (
        "import sys, vl3train.config.load as load\n"
        "load.read_config(['stage=1', 'model=2b'])\n"
        "print([name for name in ('torch', 'transformers', 'deepspeed') if name in sys.modules])"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert time.monotonic() - started < 10  # about 0.5 s on an idle core


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_option_by_its_former_name_is_told_the_name_it_has_now(old, new):
    _, found = read_config(["stage=1", f"{old}=true"])
    assert [str(problem) for problem in found if problem.key == old] == [
        f"{old}=true: was renamed to {new}; write {new}=true"
    ]
    assert new in OPTIONS


def test_the_config_of_a_run_by_an_earlier_build_is_read(tmp_path):
    cfg = read(*STAGE_1, "data.max_consecutive_failed=7")
    before = as_plain(cfg)
    before["data"]["max_consecutive_bad"] = before["data"].pop("max_consecutive_failed")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(before))
    assert read(config_file=file).data.max_consecutive_failed == 7
    file.write_text(
        "stage: 1\ndata: {max_consecutive_bad: 7}\n"
    )  # written by hand: the name to write is told
    assert "was renamed to" in told(config_file=file)[0]
    groups = {
        "stage": 1,
        "model": "debug",
        "data": "demo",
        "machine": "cpu",
        "adapter": "none",
        "tracking": "none",
    }
    file.write_text(yaml.safe_dump({**groups, "run": {"output_dir": "a"}, "step": {}, "optim": {}}))
    assert read(config_file=file).model.name == "debug", "a choice for every group is no run's config"
