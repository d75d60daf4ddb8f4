"""Several values of an option mean what they mean to Hydra's own sweeper."""

from __future__ import annotations

import doctest

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from vl3train.config.input import sweeps
from vl3train.config.input.sweeps import has_several_values, point_names, sweep_points
from vl3train.config.problems import ConfigError

WORDS = [
    ["stage=1,2", "optim.learning_rate=1e-4,3e-4"],
    ["step.max_tokens=range(1024,4096,1024)", "adapter=lora"],
    [
        "adapter.target_modules=[q_proj,v_proj],[q_proj]",
        "stage.learning_rates={projector: 1e-3},{language_model: 1e-5}",
    ],
    ["run.seed=choice(1,2,3)", "data.root='a,b',c"],
    ["run.patience=null,3", "model.language_model_from=a/b,c/d"],
]


def test_examples():
    assert doctest.testmod(sweeps).failed == 0


@pytest.mark.parametrize("words", WORDS)
def test_combinations_are_hydras(words):
    (wanted,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(words), None)
    points = sweep_points(words)
    parser = OverridesParser.create()
    found = [[parser.parse_override(text).value() for text in point.overrides] for point in points]
    assert found == [[parser.parse_override(text).value() for text in line] for line in wanted]
    names = point_names(points)
    assert len(set(names)) == len(points)
    assert all("/" not in name and len(name) < 100 for name in names)
    assert point_names(sweep_points(words)) == names


def test_a_value_that_is_there_twice_is_one_run():
    assert len(sweep_points(["run.seed=1,1,2"])) == 2


def test_words_that_no_list_comes_from_are_told_together():
    with pytest.raises(ConfigError) as error:
        sweep_points(["a=interval(0,1)", "stage=1", "b=glob(*)"])
    assert [problem.key for problem in error.value.problems] == ["a", "b"]


def test_a_word_that_cannot_be_read_is_left_to_the_config():
    assert [point.overrides for point in sweep_points(["run.seed=1,2", "= x"])] == [
        ("run.seed=1", "= x"),
        ("run.seed=2", "= x"),
    ]
    assert not has_several_values(["= x", "a=[1,2]", "b='1,2'"])
