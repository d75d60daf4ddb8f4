"""What becomes of metrics.jsonl when a run goes on."""

from __future__ import annotations

import io
import json
import re

import pytest

from tests.engine.monitor.test_console import console_of, figures
from vl3train.engine.monitor.metrics_file import changed_metrics, metrics_digest, truncate_metrics


@pytest.mark.parametrize("torn", ["", '{"step": 7, "lo'])
def test_a_resumed_log_is_that_of_a_straight_run(tmp_path, torn):
    straight = console_of(tmp_path / "straight", io.StringIO(), total=10)
    for step in range(1, 11):
        straight.metrics(figures(step))
    killed = console_of(tmp_path / "killed", io.StringIO(), total=10)
    for step in range(1, 8):
        killed.metrics(figures(step, loss=1.5))
    path = tmp_path / "killed" / "metrics.jsonl"
    path.write_text(path.read_text() + torn)
    assert truncate_metrics(path, 4) == 3 + bool(torn)
    resumed = console_of(tmp_path / "killed", io.StringIO(), first=4, total=10)
    for step in range(5, 11):
        resumed.metrics(figures(step))
    assert path.read_bytes() == (tmp_path / "straight" / "metrics.jsonl").read_bytes()
    replaced = [json.loads(line)["step"] for line in (path.parent / "metrics.replaced.jsonl").open()]
    assert replaced == [5, 6, 7], "what was computed is kept beside it"
    assert len(list(path.parent.iterdir())) == 2


def test_a_new_run_has_nothing_to_truncate(tmp_path):
    assert truncate_metrics(tmp_path / "metrics.jsonl", 0) == 0
    assert list(tmp_path.iterdir()) == []


def test_lines_of_a_build_that_counted_from_0_are_numbered_as_the_steps_that_follow(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.5}) + "\n" for step in range(4)))
    assert truncate_metrics(path, 3) == 1
    console_of(tmp_path, io.StringIO(), first=3, total=5).metrics(figures(4))
    assert [json.loads(line)["step"] for line in path.open()] == [1, 2, 3, 4]
    assert truncate_metrics(path, 3) == 1
    replaced = [json.loads(line)["step"] for line in path.with_name("metrics.replaced.jsonl").open()]
    assert replaced == [4, 4]


def test_what_cannot_be_read_stays_where_it_is(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "part_grad_norms": {}}) for step in range(1, 5)]
    path.write_bytes("\n".join([lines[0], "hello", *lines[1:], ""]).encode() + b"\xff{\n")
    assert truncate_metrics(path, 2) == 2
    assert path.read_bytes() == "\n".join([lines[0], "hello", lines[1], ""]).encode() + b"\xff{\n"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content, None),
        (
            lambda content: content + content.splitlines(keepends=True)[-1],
            None,
        ),  # a step after the checkpoint
        (lambda content: content.replace(b"2.4", b"2.5", 1), "no longer what they were"),
        (lambda content: content[: len(content) // 2], "had 3 lines .* now has 1"),
        (lambda content: b"", "had 3 lines .* now has 0"),
        (None, "had 3 lines .* now has 0"),
    ],
)
def test_a_log_that_is_not_what_the_checkpoint_saw_is_told(tmp_path, damage, said):
    assert metrics_digest(tmp_path)["lines"] == 0
    console = console_of(tmp_path, io.StringIO(), total=10)
    for step in range(1, 4):
        console.metrics(figures(step, loss=2.4))
    path = tmp_path / "metrics.jsonl"
    stored = metrics_digest(tmp_path)
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    remarks = changed_metrics(tmp_path, stored)
    assert len(remarks) == (said is not None)
    assert not said or re.search(said, remarks[0])
    assert changed_metrics(tmp_path, None) == []
