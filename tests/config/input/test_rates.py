"""A learning rate that the user wrote is the one that is used, whichever option it was written as."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.conftest import write_run_config
from vl3train.config.load import read_config
from vl3train.config.rules import adapter_rates, effective_learning_rates, full_rates
from vl3train.config.schema import TrainConfig

DEBUG = {"vision_encoder": 2e-3, "projector": 2e-3, "language_model": 1e-3}


def read(*overrides: str, config_file: Path | None = None) -> TrainConfig:
    cfg, found = read_config(["stage=2", "model=debug", *overrides], config_file=config_file)
    assert found == []
    assert cfg is not None
    return cfg


@pytest.mark.parametrize(
    ("words", "rates"),
    [
        ([], DEBUG),
        (["stage.learning_rates.projector=1e-4"], {**DEBUG, "projector": 1e-4}),
        (["stage.learning_rates={projector: 1e-4}"], {"projector": 1e-4}),
        (["stage={learning_rates: {projector: 1e-4}}"], {"projector": 1e-4}),
        (["model.learning_rates.projector=1e-4"], {**DEBUG, "projector": 1e-4}),
        (["~stage.learning_rates.projector"], {k: v for k, v in DEBUG.items() if k != "projector"}),
        (["~model.learning_rates.projector"], {**DEBUG, "projector": 1e-5}),
    ],
)
def test_the_rate_that_was_written_wins_over_the_groups(
    words: list[str], rates: dict[str, float], tmp_path: Path
):
    cfg = read(*words)
    assert effective_learning_rates(cfg) == rates
    again, found = read_config([], config_file=write_run_config(cfg, tmp_path))
    assert found == []
    assert again is not None
    assert effective_learning_rates(again) == rates


def test_the_command_line_wins_over_a_file(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: {learning_rates: {projector: 3e-4}}\n")
    assert effective_learning_rates(read(config_file=file))["projector"] == 3e-4
    line = read("stage.learning_rates.projector=1e-4", config_file=file)
    assert effective_learning_rates(line)["projector"] == 1e-4
    file.write_text("stage.learning_rates.projector: 3e-4\n")
    assert effective_learning_rates(read(config_file=file))["projector"] == 3e-4
    line = read("model.learning_rates.projector=1e-4", config_file=file)
    assert effective_learning_rates(line)["projector"] == 1e-4


def test_a_file_with_both_means_the_models_as_in_a_runs_config(tmp_path: Path):
    saved = write_run_config(read(), tmp_path)
    cfg, found = read_config([], config_file=saved)
    assert found == []
    assert cfg is not None
    assert effective_learning_rates(cfg) == DEBUG


def test_two_rates_for_one_part_are_told():
    words = ["stage=2", "stage.learning_rates.projector=1e-4", "model.learning_rates.projector=1e-3"]
    [problem] = read_config(words)[1]
    assert str(problem) == (
        "stage.learning_rates.projector=0.0001: you also wrote model.learning_rates.projector=0.001; "
        "write one of them: the part has one rate"
    )


def test_adapters_take_the_rate_that_was_written_for_their_part_or_for_themselves():
    part = "stage.learning_rates.language_model=7e-5"
    assert adapter_rates(read("adapter=lora")) == {"language_model": 1e-3}
    assert adapter_rates(read("adapter=lora", part)) == {"language_model": 7e-5}
    own = read("adapter=lora", part, "adapter.learning_rate=8e-5", "stage.learning_rates.projector=9e-5")
    assert adapter_rates(own) == {"language_model": 8e-5}
    assert full_rates(own) == {"vision_encoder": 2e-3, "projector": 9e-5}
