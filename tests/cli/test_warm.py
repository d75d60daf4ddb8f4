"""What a job would build at its first start is there after `vl3train warm`, and nothing else."""

from __future__ import annotations

import json
import tempfile

import pytest

from tests.cli.indexed import config_words
from tests.data.shards_fixture import make_recipe
from vl3train.cli.main import main
from vl3train.finetuning import launching


@pytest.mark.two_processes
def test_a_start_of_the_job_ends_before_its_first_step(
    tmp_path, tiny_model_dir, warm_python, monkeypatch, capfd
):
    monkeypatch.setattr(launching, "PYTHON", warm_python)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    make_recipe(tmp_path)
    words = config_words(tmp_path, tiny_model_dir, "tracking=tensorboard", "run.evaluate_at_start=true")
    words += [f"data.index_dir={tmp_path / 'indexes'}", "run.num_steps=2", "--nproc", "1"]
    assert main(["warm", *words]) == 0
    said = capfd.readouterr().out
    assert "plans and pictures: ready after" in said
    assert "0 of 2 steps done" in said
    assert said.endswith("warm: a start of this run finds its index, its kernels and what is compiled\n")
    manifests = list((tmp_path / "indexes").rglob("manifest.json"))
    assert sum(bool(json.loads(file.read_text())) for file in manifests) > 0
    assert list((tmp_path / "temporary").iterdir()) == []
    assert not (tmp_path / "run").exists()


def test_without_options_it_needs_no_run(capfd):
    assert main(["warm"]) == 0
    assert "plans and pictures: ready after" in capfd.readouterr().out


@pytest.mark.long
@pytest.mark.two_processes
def test_a_start_that_fails_is_not_called_warm(tmp_path, tiny_model_dir, warm_python, monkeypatch, capfd):
    monkeypatch.setattr(launching, "PYTHON", warm_python)
    make_recipe(tmp_path)
    (tmp_path / "indexes").write_text("in the way")
    words = config_words(tmp_path, tiny_model_dir, f"data.index_dir={tmp_path / 'indexes'}")
    assert main(["warm", *words, "--nproc", "1"]) == 1
    assert "warm: a start" not in capfd.readouterr().out
