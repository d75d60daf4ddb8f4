"""Several values of `vl3train finetune`: the data are made once, each run has its own answers and report."""

from __future__ import annotations

import csv

import pytest

from tests.finetuning.records import make_records
from vl3train.cli.main import main
from vl3train.finetuning import launching


@pytest.mark.long
@pytest.mark.two_processes
def test_two_rates_train_on_the_same_data(tmp_path, tiny_model_dir, warm_python, monkeypatch, capfd):
    monkeypatch.setattr(launching, "PYTHON", warm_python)
    records, out = make_records(tmp_path, 9), tmp_path / "out"
    words = ["finetune", str(records), "--model", str(tiny_model_dir), "--out", str(out), "--held-out", "25%"]
    words += ["--media-root", str(tmp_path), "--lr", "1e-3,1e-2", "data.num_workers=0", "adapter.rank=4"]
    words += ["run.num_steps=1", "finetune.predictions=1", "run.evaluate_at_start=false"]
    assert main([*words, "--dry-run"]) == 0
    names = ["learning_rate=0.001", "learning_rate=0.01"]
    said = capfd.readouterr().out
    assert all(f"run       {out / name}" in said for name in names)
    assert main(words) == 0
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["outcome"]) for row in rows] == [(name, "finished") for name in names]
    for name in names:
        assert (out / name / "predictions.jsonl").is_file()
        assert (out / name / "report" / "report.html").is_file()
        assert not (out / name / "data").exists()
    assert capfd.readouterr().out.count("held out; made") == 0, "the data were made by the dry run"
