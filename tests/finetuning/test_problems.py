"""All that keeps a fine-tuning from starting is told at once, also where the model is missing."""

from __future__ import annotations

from vl3train.cli.main import main


def test_options_are_checked_without_a_model_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["finetune", "none.jsonl", "--model", "gone", "lrr=1", "step.max_tokens=0", "data.fps=a"]
    assert main(words) != 0
    text = capsys.readouterr().err
    assert "5 problems" in text
    for part in (
        "--model gone",
        "lrr=1: no such option",
        "data.fps=a",
        "step.max_tokens=0: must be",
        "none.jsonl",
    ):
        assert part in text
    assert not list(tmp_path.iterdir())
