"""A launch that is not whole is refused: its processes would each train alone."""

from __future__ import annotations

import pytest

from vl3train.config.checks.launch import launched_ranks
from vl3train.config.problems import ConfigError
from vl3train.train import main

WHOLE = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}


def test_what_torchrun_sets_is_taken():
    assert launched_ranks(WHOLE) == 2
    assert launched_ranks({"WORLD_SIZE": "1", "RANK": "0"}) == 1


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_variable_that_is_missing_is_named(name):
    with pytest.raises(ConfigError, match=f"WORLD_SIZE=2: 2 ranks cannot connect without {name};"):
        launched_ranks({key: value for key, value in WHOLE.items() if key != name})


def test_a_rank_beyond_the_launch_and_words_for_numbers_are_refused():
    with pytest.raises(
        ConfigError, match="RANK=3: must be less than the number of ranks, WORLD_SIZE=unset, so 1"
    ):
        launched_ranks({"RANK": "3"})
    with pytest.raises(ConfigError, match="WORLD_SIZE=two: is not a whole number"):
        launched_ranks({"WORLD_SIZE": "two"})
    with pytest.raises(ConfigError, match="RANK=0: must be less than the number of ranks, WORLD_SIZE=0"):
        launched_ranks({"WORLD_SIZE": "0"})


def test_the_train_command_says_so_on_every_process(monkeypatch, capsys):
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["stage=1"]) == 2
    assert "2 ranks cannot connect without LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in capsys.readouterr().err
