"""Held-out figures: exact match per sample, chance is the most frequent answer, one line per evaluation."""

from __future__ import annotations

import json

import pytest

from vl3train.engine.held_out.losses import record_evaluation, summarize


def test_figures_are_of_samples_not_of_tokens():
    rows = [
        # source, all right, loss sum, supervised tokens, answer
        (0, True, 1.0, 2, (5, 9)),
        (0, False, 3.0, 6, (6, 9)),
        (0, True, 2.0, 2, (5, 9)),
        (1, False, 4.0, 1, (7,)),
    ]
    figures = summarize(rows, ["count", "colour", "empty"])
    assert figures["count"]["accuracy"] == pytest.approx(2 / 3)
    assert figures["count"]["chance"] == pytest.approx(2 / 3)
    assert figures["count"]["loss"] == pytest.approx(6.0 / 10)
    assert figures["colour"] == {
        "samples": 1,
        "loss": 4.0,
        "accuracy": 0.0,
        "chance": 1.0,
        "supervised_tokens": 1,
    }
    assert "empty" not in figures


def test_an_evaluation_made_again_after_a_resume_replaces_the_old_one(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    for step, accuracy in ((0, 0.1), (10, 0.5), (20, 0.7), (10, 0.6)):
        record_evaluation(path, stage=3, step=step, when="step", figures={"count": {"accuracy": accuracy}})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["sources"]["count"]["accuracy"]) for line in lines] == [(0, 0.1), (10, 0.6)]
