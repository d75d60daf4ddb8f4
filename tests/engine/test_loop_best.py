"""A run that gets no better keeps its best checkpoint, also over a stop, and ends early."""

from __future__ import annotations

import json

import pytest

from tests.engine.runs import figures, run
from vl3train.engine.ranks import RunError


def test_a_stopped_run_knows_its_best_step_and_ends_when_nothing_gets_better(demo_words, tmp_path, capsys):
    out = tmp_path / "out"
    words = [
        *demo_words,
        "stage=1",
        f"run.output_dir={out}",
        "run.num_steps=5",
        "run.save_steps=100",
        "run.keep_checkpoints=1",
        "run.evaluate_steps=1",
        "run.best_figure=accuracy",
        "run.patience=2",
        "optim.learning_rate=1e-9",  # accuracy stays what it is
    ]
    run([*words, "run.stop_after_steps=2"])
    assert json.loads((out / "best.json").read_text())["step"] == 1
    assert sorted(path.name for path in (out / "checkpoints").glob("step_*")) == [
        "step_00000001",
        "step_00000002",
    ]

    log = out / "evaluations.jsonl"
    first, second = log.read_text().splitlines(keepends=True)
    log.write_text(second)
    with pytest.raises(
        RunError, match=r"it had 1 evaluation of steps before 2 .*, and now has 0\. Restore it"
    ):
        run(words)
    log.write_text(first + second)
    capsys.readouterr()
    run(words)
    said = capsys.readouterr().out
    assert "stage 1, step 3" in said
    assert "stage 1, step 2" not in said, "that evaluation was made before the stop"
    best = json.loads((out / "best.json").read_text())
    assert [one["step"] for one in best["history"]] == [1, 2, 3]
    assert (best["step"], best["checkpoint"]) == (1, "checkpoints/step_00000001")
    assert len(figures(out)) == 3
    assert (out / "finished.json").is_file()
    assert sorted(path.name for path in (out / "checkpoints").glob("step_*")) == [
        "step_00000001",
        "step_00000003",
    ]
