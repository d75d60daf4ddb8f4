"""A run's mark that it is finished holds for its own options; which tokenizer a run takes."""

from __future__ import annotations

import dataclasses
import json

import pytest

from vl3train.config.input.options import RENAMED
from vl3train.config.paths import is_finished, mark_finished, tokenizer_source
from vl3train.config.problems import ConfigError
from vl3train.config.schema import ModelConfig, RunConfig, StageConfig, TrainConfig


def config(folder, **run):
    stage = StageConfig(number=1, name="1", recipe="r", learning_rates={"projector": 1e-3})
    return TrainConfig(
        stage=stage, model=ModelConfig(name="debug"), run=RunConfig(output_dir=str(folder), **run)
    )


def test_a_run_is_finished_for_its_own_options_only(tmp_path):
    cfg = config(tmp_path, num_steps=10)
    assert not is_finished(cfg)
    mark_finished(cfg)
    assert is_finished(cfg)
    assert not is_finished(config(tmp_path, num_steps=20)), "a longer run goes on"
    elsewhere = dataclasses.replace(cfg, machine=dataclasses.replace(cfg.machine, dp_size=8))
    assert is_finished(elsewhere), "on how many ranks it is asked does not matter"


def test_a_run_that_an_earlier_build_finished_is_finished(tmp_path):
    cfg = config(tmp_path)
    mark_finished(cfg)
    file = tmp_path / "finished.json"
    renamed = {new.split(".")[1]: old.split(".")[1] for old, new in RENAMED.items()}
    before = {
        section: {renamed.get(name, name): value for name, value in options.items()}
        for section, options in json.loads(file.read_text()).items()
    }
    assert "max_bad_fraction" in before["data"]
    file.write_text(json.dumps(before))
    assert is_finished(cfg)
    del before["run"]["best_figure"], before["optim"]["learning_rate"]  # it did not have these options
    file.write_text(json.dumps(before))
    assert is_finished(cfg)
    assert not is_finished(config(tmp_path, patience=3, num_steps=7))
    before["data"]["max_bad_fraction"] = 0.5
    file.write_text(json.dumps(before))
    assert not is_finished(cfg)


@pytest.mark.parametrize("damaged", ['{"run": 1', "[1]", '{"run": [1]}'])
def test_a_damaged_mark_is_a_problem_with_a_way_out(tmp_path, damaged):
    (tmp_path / "finished.json").write_text(damaged)
    with pytest.raises(ConfigError, match=r"finished\.json is damaged; delete .*newest checkpoint"):
        is_finished(config(tmp_path))


def test_a_run_and_the_commands_that_open_its_index_take_one_tokenizer(tmp_path):
    """In this order: the one named, that of the checkpoint a stage starts from, the language model's."""
    cfg = config(tmp_path)
    published = dataclasses.replace(cfg.model, language_model_from="Qwen/Qwen2.5-1.5B-Instruct")
    cfg = dataclasses.replace(cfg, model=published)
    assert tokenizer_source(cfg) == "Qwen/Qwen2.5-1.5B-Instruct"
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text('{"model_type": "video_llama_3"}')
    cfg = dataclasses.replace(cfg, stage=dataclasses.replace(cfg.stage, init_from=str(tmp_path)))
    assert tokenizer_source(cfg) == tmp_path / "weights"
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, tokenizer_from="my/tokenizer"))
    assert tokenizer_source(cfg) == "my/tokenizer"
