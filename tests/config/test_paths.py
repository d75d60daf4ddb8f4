"""A run's own mark that it is done holds for the options it was run with."""

from __future__ import annotations

import dataclasses

from vl3train.config.paths import is_finished, mark_finished
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
