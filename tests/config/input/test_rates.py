"""A learning rate that the user wrote is the one that is used, whichever option it was written as."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.config.conftest import write_run_config
from vl3train.config.checks.ranges import range_problems
from vl3train.config.load import read_config
from vl3train.config.rules import adapter_rates, effective_learning_rates, full_rates, rate_problems
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
    assert adapter_rates(read("adapter=lora")) == {"language_model": 1e-4}
    assert adapter_rates(read("adapter=lora", part)) == {"language_model": 7e-5}
    own = read("adapter=lora", part, "adapter.learning_rate=8e-5", "stage.learning_rates.projector=9e-5")
    assert adapter_rates(own) == {"language_model": 8e-5}
    both = "adapter.parts=[language_model,vision_encoder]"
    assert adapter_rates(read("adapter=lora", both, part)) == {"language_model": 7e-5, "vision_encoder": 1e-4}


@pytest.mark.parametrize("word", ["0", "null", "0.0"])
def test_a_part_without_a_rate_is_frozen_and_stays_so(word: str, tmp_path: Path):
    rates = {part: rate for part, rate in DEBUG.items() if part != "vision_encoder"}
    cfg = read(f"stage.learning_rates.vision_encoder={word}")
    assert effective_learning_rates(cfg) == rates
    again, found = read_config([], config_file=write_run_config(cfg, tmp_path))
    assert found == []
    assert again is not None
    assert effective_learning_rates(again) == rates
    (tmp_path / "mine.yaml").write_text(f"stage.learning_rates.vision_encoder: {word}")
    assert effective_learning_rates(read(config_file=tmp_path / "mine.yaml")) == rates
    whole = read(f"stage.learning_rates={{vision_encoder: {word}, projector: 1e-4}}")
    assert effective_learning_rates(whole) == {"projector": 1e-4}


def test_a_rate_of_no_part_is_told_and_a_frozen_part_may_be_frozen():
    [problem] = problems_of("stage.learning_rates.vision_tower=0")
    assert problem.startswith("stage.learning_rates.vision_tower=0.0: the model has no such part")
    first = ["stage=2", "model=2b", "stage.learning_rates={projector: 1e-3}"]
    cfg, found = read_config([*first, "stage.learning_rates.vision_encoder=null"])
    assert found == []
    assert cfg is not None
    assert effective_learning_rates(cfg) == {"projector": 1e-3}
    problems = problems_of("stage.learning_rates={projector: null}")
    assert problems == [
        "stage.learning_rates={}: nothing would be trained; name parts with a rate each: vision_encoder, projector, "
        "language_model"
    ]
    [problem] = problems_of("model.learning_rates.projector=0")
    assert problem.endswith("to freeze a part, write stage.learning_rates.projector=null")


def problems_of(*words: str) -> list[str]:
    cfg, found = read_config(["stage=2", "model=debug", *words])
    assert cfg is not None
    return [str(one) for one in (*found, *rate_problems(cfg))]


ALL = {part: 3e-4 for part in DEBUG}


@pytest.mark.parametrize(
    ("file", "line", "rates"),
    [
        ("", ["optim.learning_rate=3e-4"], ALL),
        ("optim.learning_rate: 3e-4", [], ALL),
        ("", ["optim.learning_rate=3e-4", "stage.learning_rates.projector=1e-4"], {**ALL, "projector": 1e-4}),
        ("", ["optim.learning_rate=3e-4", "model.learning_rates.projector=1e-4"], {**ALL, "projector": 1e-4}),
        ("", ["optim.learning_rate=3e-4", "stage.learning_rates.projector=0"], "without projector"),
        ("stage.learning_rates: {projector: 1e-4}", ["optim.learning_rate=3e-4"], {"projector": 3e-4}),
        ("optim: {learning_rate: 3e-4}", ["stage.learning_rates.projector=1e-4"], {**ALL, "projector": 1e-4}),
        ("optim: {learning_rate: 3e-4}", ["optim.learning_rate=null"], DEBUG),
        ("model: {learning_rates: {projector: 1e-4}}", ["optim.learning_rate=3e-4"], ALL),
    ],
)
def test_one_rate_for_all_gives_way_to_what_is_written_closer(file, line, rates, tmp_path: Path):
    if rates == "without projector":
        rates = {part: rate for part, rate in ALL.items() if part != "projector"}
    (tmp_path / "mine.yaml").write_text(file or "{}")
    cfg = read(*line, config_file=tmp_path / "mine.yaml")
    assert effective_learning_rates(cfg) == rates
    again, _ = read_config([], config_file=write_run_config(cfg, tmp_path))
    assert again is not None
    assert effective_learning_rates(again) == rates


def test_one_rate_for_all_is_the_adapters_too(tmp_path: Path):
    words = ["adapter=lora", "optim.learning_rate=3e-4"]
    assert adapter_rates(read(*words)) == {"language_model": 3e-4}
    assert adapter_rates(read(*words, "adapter.learning_rate=5e-5")) == {"language_model": 5e-5}
    assert adapter_rates(read(*words, "stage.learning_rates.language_model=5e-5")) == {"language_model": 5e-5}
    (tmp_path / "mine.yaml").write_text("adapter: {learning_rate: 5e-5}")
    assert adapter_rates(read(*words, config_file=tmp_path / "mine.yaml")) == {"language_model": 3e-4}
    frozen = read(*words, "adapter.parts=[vision_encoder]", "stage.learning_rates={projector: 1e-3}")
    assert (adapter_rates(frozen), full_rates(frozen)) == ({"vision_encoder": 3e-4}, {"projector": 1e-3})
    again, _ = read_config([], config_file=write_run_config(frozen, tmp_path))
    assert again is not None
    assert adapter_rates(again) == {"vision_encoder": 3e-4}
    [problem] = [one for one in range_problems(read("optim.learning_rate=3"))]
    assert str(problem).startswith("optim.learning_rate=3.0: must be between 0 and 1")


def test_a_written_rate_wins_over_the_adapters_rate_of_an_own_group(tmp_path: Path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine.yaml").write_text("kind: lora\nlearning_rate: 1e-4\n")
    words = ["stage=2", "model=debug", "adapter=mine"]

    def rates(*more: str) -> dict[str, float]:
        cfg, found = read_config([*words, *more], config_dir=tmp_path)
        assert found == []
        assert cfg is not None
        return adapter_rates(cfg)

    assert rates() == {"language_model": 1e-4}
    assert rates("stage.learning_rates.projector=1e-5") == {"language_model": 1e-4}
    for owner in ("stage", "model"):
        assert rates(f"{owner}.learning_rates.language_model=5e-5") == {"language_model": 5e-5}
    both = ("stage.learning_rates.language_model=5e-5", "adapter.learning_rate=3e-4")
    assert rates(*both) == {"language_model": 3e-4}
    both_parts = "adapter.parts=[language_model, vision_encoder]"
    assert rates(both_parts, both[0]) == {"language_model": 5e-5, "vision_encoder": 1e-4}


@pytest.mark.parametrize(
    ("words", "full"),
    [
        ([], {}),
        (["stage.learning_rates.projector=9e-5"], {"projector": 9e-5}),
        (["adapter.modules_to_save=[projector]"], {"projector": 2e-3}),
        (
            ["adapter.modules_to_save=[projector,vision_encoder]", "~model.learning_rates.vision_encoder"],
            {"projector": 2e-3, "vision_encoder": 2e-6},
        ),
        (["stage.learning_rates={vision_encoder: 1e-6}"], {"vision_encoder": 1e-6}),
    ],
)
def test_beside_adapters_only_what_is_named_trains(words: list[str], full: dict[str, float], tmp_path: Path):
    cfg = read("adapter=lora", *words)
    assert full_rates(cfg) == full
    again, found = read_config([], config_file=write_run_config(cfg, tmp_path))
    assert found == []
    assert again is not None
    assert (full_rates(again), adapter_rates(again)) == (full, adapter_rates(cfg))


def test_a_config_of_an_earlier_run_with_adapters_keeps_its_meaning(tmp_path: Path):
    """It wrote the stage's rates of all parts, and trained those without adapters in full."""
    saved = write_run_config(read(), tmp_path)
    before = {"kind": "lora", "parts": ["language_model"], "rank": 64, "alpha": 16, "learning_rate": None}
    whole = yaml.safe_load(saved.read_text())
    saved.write_text(yaml.safe_dump({**whole, "adapter": before}))
    cfg, found = read_config([], config_file=saved)
    assert found == []
    assert cfg is not None
    assert full_rates(cfg) == {"vision_encoder": 2e-3, "projector": 2e-3}
    assert adapter_rates(cfg) == {"language_model": 1e-3}
    assert cfg.adapter.alpha == 16
