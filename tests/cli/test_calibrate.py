"""Known costs are found again from the times they would make; the command ends in a line that a config takes."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.cli.indexed import config_words
from vl3train.cli.main import main
from vl3train.config.load import load_config
from vl3train.preview.calibrate import UNIT, fitted_costs, kinds, made_batch, quantities


def test_known_costs_are_found_again():
    held = [quantities(made_batch(kind, 2)) for kind in kinds(16384, 65536)]
    truth = np.array([5e-3, 2e-5, 6e-10, 6e-6, 9e-10])
    noise = 1 + 0.01 * np.random.default_rng(0).standard_normal(len(held))
    seconds = np.array(held) @ truth * noise
    costs, error = fitted_costs(list(zip(held, seconds.tolist(), strict=True)))
    expected = truth[1:] / (truth[1] + truth[3]) * UNIT
    assert error < 0.02
    assert list(costs.values()) == pytest.approx(expected, rel=0.25, abs=1)
    assert costs["token"] == pytest.approx(expected[0], rel=0.05)


def test_nothing_comes_out_negative():
    held = [quantities(made_batch(kind, 2)) for kind in kinds(2048, 4096)]
    seconds = [1e-5 * row[1] + 1e-3 - 1e-10 * row[4] for row in held]
    costs, _ = fitted_costs(list(zip(held, seconds, strict=True)))
    assert min(costs.values()) == 0


def test_the_command_prints_costs_that_a_config_takes(tmp_path, tiny_model_dir, capsys):
    (tmp_path / "data").mkdir()
    words = [
        word for word in config_words(tmp_path / "data", tiny_model_dir) if not word.startswith("data.recipe")
    ]
    assert main(["calibrate", *words, "--repeats", "1"]) == 0
    line = re.search(r"^model\.costs=\{.*\}$", capsys.readouterr().out, re.MULTILINE)
    assert line is not None
    cfg = load_config([*words, line[0]])
    assert set(cfg.model.costs) == {"token", "token_pair", "patch", "patch_pair"}
    assert cfg.model.costs["token"] + cfg.model.costs["patch"] == pytest.approx(UNIT, abs=2)
