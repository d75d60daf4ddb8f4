"""A trained model is measured wherever it lies, whatever became of what it started from."""

from __future__ import annotations

from argparse import Namespace

import pytest

from tests.config.conftest import write_run_config
from vl3train.cli.evaluate import main
from vl3train.config.load import read_config
from vl3train.config.problems import ConfigError


def test_what_a_run_started_from_need_not_be_there_and_other_mistakes_are_told(tmp_path):
    words = ["stage=2", "model=debug", "data=demo", f"stage.init_from={tmp_path / 'gone'}"]
    cfg, _ = read_config([*words, f"data.root={tmp_path / 'nowhere'}", f"run.output_dir={tmp_path}"])
    write_run_config(cfg, tmp_path)
    with pytest.raises(ConfigError) as caught:
        main(Namespace(run=tmp_path, overrides=["step.max_tokens=0"], model=None, json=None))
    keys = [problem.key for problem in caught.value.problems]
    assert {"step.max_tokens", "data.root"} <= set(keys)
    assert "stage.init_from" not in keys
