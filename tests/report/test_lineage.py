"""Runs that started from each other are joined, alternatives lie over each other: also on paper that was moved."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from vl3train.report.lineage import place_runs
from vl3train.report.make import make_report
from vl3train.report.run_log import RunLog


def log(folder, num_steps, init_from=None):
    steps = [{"step": step, "loss": 1.0} for step in range(1, num_steps + 1)]
    start = None if init_from is None else Path(init_from)
    return RunLog(name=Path(folder).name, steps=steps, folder=Path(folder), init_from=start)


def placed(*runs):
    return [(one.before, one.parent and one.parent.name) for one in place_runs(runs)]


def test_two_fine_tunes_of_one_model_are_alternatives():
    assert placed(log("/r/a", 50, "/models/2b"), log("/r/b", 80, "/models/2b")) == [(0, None), (0, None)]
    assert placed(log("/r/a", 50), log("/r/b", 80)) == [(0, None), (0, None)]


def test_a_run_is_joined_where_it_started_whatever_the_order():
    one, two = log("/r/1", 50), log("/r/2", 30, "/r/1")
    early = log("/r/early", 10, "/r/1/checkpoints/step_000020")
    inside = log("/r/inside", 10, "/r/2/checkpoints/step_000030/weights")
    assert placed(inside, early, two, one) == [(80, "2"), (20, "1"), (50, "1"), (0, None)]
    assert placed(two, inside) == [(0, None), (30, "2")], "the run before is not in the report"


def test_a_relative_start_is_found_from_another_working_folder():
    runs = [log("/elsewhere/runs/1", 50), log("/elsewhere/runs/2", 30, "runs/1/checkpoints/step_000050")]
    assert placed(*runs) == [(0, None), (50, "1")]
    twins = [log("/x/runs/1", 50), log("/y/runs/1", 60), log("/x/runs/2", 30, "runs/1")]
    assert placed(*twins)[2] == (0, None), "it could be either"


def test_held_out_figures_go_on_from_those_of_the_run_before():
    def evaluated(run, values):
        lines = [
            {"step": step, "when": "step", "sources": {"a": {"loss": value}}}
            for step, value in values.items()
        ]
        return dataclasses.replace(run, evaluations=lines)

    before = evaluated(log("/r/1", 50), {0: 4.0, 20: 3.0, 50: 2.0})
    after = evaluated(log("/r/2", 30, "/r/1"), {30: 1.0})
    early = evaluated(log("/r/3", 30, "/r/1/checkpoints/step_000020"), {30: 1.5})
    between = evaluated(log("/r/4", 30, "/r/1/checkpoints/step_000030"), {30: 1.5})
    one, two, three, four = place_runs([before, after, early, between])
    assert two.held_out("a", "loss") == ([50, 80], [{"loss": 2.0}, {"loss": 1.0}])
    assert three.held_out("a", "loss") == ([20, 50], [{"loss": 3.0}, {"loss": 1.5}])
    assert four.held_out("a", "loss")[0] == [60]
    assert one.held_out("a", "loss")[0] == [0, 20, 50]
    assert one.held_out("a", "anls") == one.held_out("b", "loss") == ([], [])


def test_runs_in_a_ring_are_drawn_all_the_same():
    assert placed(log("/r/a", 5, "/r/b"), log("/r/b", 5, "/r/a"), log("/r/c", 5, "/r/c"))[2] == (0, None)


def test_names_tell_runs_apart(tmp_path):
    runs = [log(tmp_path / "x" / "run", 5), log(tmp_path / "y" / "run", 5)]
    text = make_report(runs, tmp_path / "out", []).read_text()
    assert "x-run" in text
    assert "y-run" in text
    with pytest.raises(ValueError, match="given twice"):
        make_report([runs[0], runs[0]], tmp_path / "out", [])
