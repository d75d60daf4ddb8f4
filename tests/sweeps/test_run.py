"""A sweep trains each combination once, outlives a run that fails, and says what all reached."""

from __future__ import annotations

import csv

import pytest

from vl3train.cli.main import main
from vl3train.contracts.exit_codes import FAILED, STOPPED
from vl3train.finetuning import launching

OPTIONS = ["stage=1", "run.num_steps=2", "run.evaluate_at_end=true", "run.best_figure=loss"]


def table(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def sweep(demo_words, tmp_path, warm_python, monkeypatch):
    """The command's words, and its folder."""
    monkeypatch.setattr(launching, "PYTHON", warm_python)
    words = [*demo_words, *OPTIONS, f"run.output_dir={tmp_path / 'sweep'}"]
    return ["train", "-m", *words, "optim.learning_rate=1e-3,1e-2", "--nproc", "1"], tmp_path / "sweep"


@pytest.mark.two_processes
def test_each_run_is_done_once_and_one_that_fails_ends_no_other(sweep, capfd):
    words, folder = sweep
    names = ["learning_rate=0.001", "learning_rate=0.01"]
    (folder / names[0]).mkdir(parents=True)
    (folder / names[0] / "checkpoints").write_text("in the way")
    assert main(words) == FAILED
    assert [row["run"] for row in table(folder)] == names
    assert [row["outcome"] for row in table(folder)] == ["failed (exit code 1)", "finished"]
    assert "1 run failed: learning_rate=0.001" in capfd.readouterr().out
    done = (folder / names[1] / "metrics.jsonl").stat().st_mtime_ns

    (folder / names[0] / "checkpoints").unlink()
    assert main(words) == 0
    said = capfd.readouterr().out
    assert "run 2 of 2: learning_rate=0.01: finished before" in said
    assert (folder / names[1] / "metrics.jsonl").stat().st_mtime_ns == done
    rows = table(folder)
    assert [row["learning_rate"] for row in rows] == ["0.001", "0.01"]
    assert [row["outcome"] for row in rows] == ["finished", "finished"]
    losses = [float(row["held_out_loss"]) for row in rows]
    assert losses[0] != losses[1]
    assert all(float(row["seconds"]) > 0 and row["step"] == "2" for row in rows)
    best = names[losses.index(min(losses))]
    assert f"best: {best}, held-out loss {min(losses):.4f} after step 2" in said


@pytest.mark.two_processes
def test_a_sweep_that_is_stopped_goes_on_where_it_was(sweep, capfd):
    words, folder = sweep
    assert main([*words, "run.max_hours=1e-9"]) == STOPPED
    assert [row["outcome"] for row in table(folder)] == ["stopped", "not started"]


def test_all_runs_are_checked_before_the_first(demo_words, tmp_path, capsys):
    words = [*demo_words, *OPTIONS, f"run.output_dir={tmp_path / 'sweep'}"]
    assert main(["train", "-m", *words, "run.num_steps=1,-1", "run.seed=x,2"]) != 0
    said = capsys.readouterr().err
    assert "run.num_steps=-1" in said
    assert "run.seed=x" in said
    assert said.startswith("2 problems") or "2 problems" in said
    assert not (tmp_path / "sweep").exists()
    assert main(["train", "-m", *words, f"run.output_dir={tmp_path}/a,{tmp_path}/b"]) != 0
    assert "run.output_dir" in capsys.readouterr().err
    assert main(["train", *words, "run.seed=1,2"]) != 0
    assert "vl3train train -m" in capsys.readouterr().err
