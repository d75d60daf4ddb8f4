"""Where the limits of loss and norm lie: above every step of normal trainings, below a spike."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import pytest

from vl3train.config.optim_options import OptimConfig
from vl3train.engine.bad_steps.limits import WINDOW, SpikeLimits
from vl3train.engine.step import NO_LIMITS

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
DEFAULT = OptimConfig().spike_limit


def filled(losses, norms, deviations=DEFAULT):
    found = SpikeLimits(deviations)
    for pair in zip(losses, norms, strict=True):
        found.add(*pair)
    return found


@pytest.mark.parametrize("name", ["loss_curves", "loss_curves_gpu"])
def test_no_step_of_the_recorded_trainings_comes_near_its_limit(name):
    steps = 0
    for line in (RESULTS / f"{name}.jsonl").read_text().splitlines():
        found = SpikeLimits(DEFAULT / 4)  # a quarter of what is allowed
        for loss in json.loads(line).get("more", {}).get("losses", []):
            assert loss <= found.limits().loss
            found.add(loss, 1.0)
            steps += 1
    assert steps > 1000


def test_norms_that_vary_as_much_as_those_of_small_batches_are_allowed_and_a_spike_is_not():
    rng = random.Random(0)
    norms = [rng.lognormvariate(0.0, 0.6) for _ in range(4000)]
    found = SpikeLimits(DEFAULT)
    for norm in norms:
        assert norm <= found.limits().grad_norm
        found.add(2.0, norm)
    assert 5 < found.limits().grad_norm < 100


def test_limits_are_the_median_and_so_many_deviations():
    losses, norms = [float(number) for number in range(WINDOW)], [1.0] * WINDOW
    found = filled(losses, norms, deviations=3.0).limits()
    deviation = 1.4826 * statistics.median(abs(loss - 31.5) for loss in losses)
    assert found.loss == 31.5 + 3 * deviation
    assert found.grad_norm == 1.0 + 3 * 0.5, "norms that are all the same may still vary"
    assert filled([0.01] * WINDOW, norms, deviations=3.0).limits().loss == pytest.approx(0.31)


def test_there_are_none_before_half_of_the_window_and_with_0():
    half = WINDOW // 2
    assert filled([1.0] * (half - 1), [1.0] * (half - 1)).limits() == NO_LIMITS
    assert filled([1.0] * half, [1.0] * half).limits() != NO_LIMITS
    assert filled([1.0] * half, [1.0] * half, deviations=0.0).limits() == NO_LIMITS


def test_a_few_outliers_hardly_move_them():
    losses = [1 + number / 64 for number in range(64)]
    calm = filled(losses, [1.0] * 64).limits()
    wild = filled([*losses[4:], *[1e30] * 4], [1.0] * 64).limits()
    assert wild.loss < calm.loss * 1.1


def test_their_state_goes_through_json_to_the_last_bit():
    rng = random.Random(1)
    found = filled(*[[rng.random() for _ in range(100)] for _ in range(2)])
    again = SpikeLimits(DEFAULT)
    again.load(json.loads(json.dumps(found.state())))
    assert again.limits() == found.limits()
    assert again.state() == found.state()
