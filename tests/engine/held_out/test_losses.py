"""Held-out figures: exact match per sample, chance is the most frequent answer, one line per evaluation."""

from __future__ import annotations

import json
import math

import pytest

from vl3train.engine.held_out.losses import (
    read_evaluations,
    record_evaluation,
    summarize,
    truncate_evaluations,
)


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

    def record(step, accuracy):
        record_evaluation(path, stage=3, step=step, when="step", figures={"count": {"accuracy": accuracy}})

    def lines(name):
        found = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        return [(line["step"], line["sources"]["count"]["accuracy"]) for line in found]

    for step, accuracy in ((0, 0.1), (10, 0.5), (20, 0.7), (20, 0.8)):
        record(step, accuracy)
    truncate_evaluations(path, 9)
    record(10, 0.6)
    assert lines("evaluations.jsonl") == [(0, 0.1), (10, 0.6)]
    assert lines("evaluations.replaced.jsonl") == [(10, 0.5), (20, 0.8)]


def test_a_flipped_bit_of_a_figure_is_told(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    for step in (1, 2):
        record_evaluation(path, stage=3, step=step, when="step", figures={"count": {"loss": 0.25 + step}})
    before = path.read_text()
    path.write_text(before.replace("2.25", "2.24"))
    with pytest.raises(ValueError, match=r"line 2 is no evaluation .*its digest differs"):
        read_evaluations(path)
    path.write_text(before.replace('"sha256"', '"other"'))
    assert [line["step"] for line in read_evaluations(path)] == [1, 2], "an earlier build's lines have none"


def test_a_figure_that_is_not_finite_is_json_and_is_read_back(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    figures = {"count": {"loss": math.nan, "accuracy": 0.0}, "ocr": {"loss": math.inf}}
    record_evaluation(path, stage=3, step=0, when="step", figures=figures)
    record_evaluation(path, stage=3, step=5, when="step", figures=figures)  # reads the line before

    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    for line in path.read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)["sources"]["count"]["loss_text"] == "nan"
    truncate_evaluations(path, 0)
    [found] = read_evaluations(path)
    assert str(found["sources"]) == str(figures)
