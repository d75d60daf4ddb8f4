"""evaluations.jsonl: one line per evaluation, by which the best checkpoint is chosen; damage and loss are told."""

from __future__ import annotations

import json
import math

import pytest

from vl3train.engine.held_out.evaluations_file import (
    evaluations_before,
    lost_evaluations,
    read_evaluations,
    record_evaluation,
    truncate_evaluations,
)


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


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda lines: [*lines, lines[2].replace("30", "40")], None),  # of later steps
        (lambda lines: [lines[1], lines[0], lines[2]], None),
        (lambda lines: lines[:1] + lines[2:], "it had 2 evaluations of steps before 30 .*, and now has 1"),
        (lambda lines: [lines[0], lines[1].replace("0.5", "0.6")], "these are no longer what they were"),
        (lambda lines: None, "is gone. It had 2 evaluations"),
    ],
)
def test_evaluations_that_a_checkpoint_counted_and_that_are_lost_are_told(tmp_path, damage, said):
    path = tmp_path / "evaluations.jsonl"
    for step in (10, 20, 30):
        record_evaluation(path, stage=3, step=step, when="step", figures={"count": {"loss": 0.5}})
    stored = json.loads(json.dumps(evaluations_before(path, 30)))
    lines = damage(without_digests(path))
    path.unlink()
    if lines is not None:
        path.write_text("".join(lines))

    def told(stored):
        return lost_evaluations(path, read_evaluations(path), stored, 30)

    assert told(None) == [], "a checkpoint of an earlier build"
    if said is None:
        assert told(stored) == []
    elif lines is None:
        assert said in told(stored)[0]
    else:
        with pytest.raises(ValueError, match=said):
            told(stored)


def test_a_damaged_file_is_not_counted(tmp_path):
    (tmp_path / "evaluations.jsonl").write_text("{")
    assert evaluations_before(tmp_path / "evaluations.jsonl", 1) is None


def without_digests(path):
    """The lines as earlier builds wrote them: a test can then change a step."""
    found = [
        {key: value for key, value in line.items() if key != "sha256"} for line in read_evaluations(path)
    ]
    return [json.dumps(line) + "\n" for line in found]
