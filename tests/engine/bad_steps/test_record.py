"""Rows of skipped steps, the ranges that are passed over, and resume.json with and without them."""

from __future__ import annotations

import json
import math

from vl3train.config.optim_options import OptimConfig
from vl3train.engine.bad_steps.record import BadSteps
from vl3train.engine.step import StepResult


def result(*, is_skipped):
    return StepResult(
        loss=math.nan if is_skipped else 1.0,
        grad_norm=1.0,
        part_norms={},
        source_losses={},
        num_failed_samples=0,
        stop_requested=False,
        is_skipped=is_skipped,
        is_void=False,
        token_losses=[],
    )


def after(pattern, first=0, row=3):
    """A record after good (.) and skipped (x) steps."""
    bad = BadSteps(OptimConfig(max_skipped_steps=row))
    for step, one in enumerate(pattern, start=first):
        bad.count(step, result(is_skipped=one == "x"))
    return bad


def test_only_steps_in_a_row_count():
    assert not after("xx.xx.").too_many
    bad = after("..xxx", first=10)
    assert bad.too_many
    assert bad.range_to_pass_over(15) == (9, 15), "the row, and as many steps before it"
    assert after("xxx").range_to_pass_over(3) == (0, 3)


def test_numbers_of_skipped_steps_are_no_part_of_the_limits():
    assert after("..x.").spikes.state() == {"losses": [1.0] * 3, "grad_norms": [1.0] * 3}


def test_loading_stops_before_a_range_and_goes_on_behind_it():
    bad = after("")
    bad.passed_over = [(20, 24), (5, 8)]
    assert [bad.range_ahead(step, 30) for step in (0, 5, 8, 24)] == [5, 20, 20, 30]
    assert bad.range_ahead(8, 10) == 10


def test_its_state_goes_through_a_resume_json():
    bad = after("..xx")
    bad.passed_over = [(1, 2)]
    again = after("")
    again.load(json.loads(json.dumps({"bad_steps": bad.state()})))
    assert again.state() == bad.state()
    assert again.passed_over == [(1, 2)]


def test_a_resume_json_from_before_has_none():
    fresh = after("")
    fresh.load({"failed_samples": {"seen": 3, "failed": 0}})
    assert fresh.state() == after("").state()
