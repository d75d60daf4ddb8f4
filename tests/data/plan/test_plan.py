"""Exactly once per epoch, caps never exceeded, and the same packs for whoever asks."""

from __future__ import annotations

import dataclasses
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl3train.config.schema import StepConfig
from vl3train.contracts.records import Cursor
from vl3train.data.plan.costs import rank_packs
from vl3train.data.plan.order import OrderRules, samples_per_epoch
from vl3train.data.plan.plan import Plan
from vl3train.data.plan.sample_table import SampleTable


def table(sizes, *, weights=None, seed=0, max_tokens=100, max_patches=400, fingerprint="index"):
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    patches = rng.integers(0, max_patches + 1, n) * rng.integers(0, 2, n)
    tokens = rng.integers(1, max_tokens + 1, n)
    return SampleTable(
        sizes=tuple(sizes),
        weights=tuple(weights or [1.0] * len(sizes)),
        num_tokens=tokens,
        num_supervised_tokens=tokens // 2,
        num_patches=patches,
        num_patch_pairs=patches**2,
        fingerprint=fingerprint,
    )


def step_config(**changes):
    values = {"max_tokens": 100, "max_patches": 400, "global_packs": 4, "max_samples": None}
    return StepConfig(**(values | changes))


def all_steps(plan, epoch):
    first = sum(plan.steps_in_epoch(e) for e in range(epoch))
    return [plan.step_packs(plan.cursor_at(first + i)) for i in range(plan.steps_in_epoch(epoch))]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    longest=st.integers(1, 100),
    largest=st.integers(0, 400),
    packs=st.integers(1, 9),
    fill=st.floats(0.3, 1.0),
    max_samples=st.one_of(st.none(), st.integers(1, 20)),
    epoch=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_every_sample_exactly_once_and_no_cap_exceeded(
    sizes, longest, largest, packs, fill, max_samples, epoch, seed
):
    data = table(sizes, seed=seed, max_tokens=longest, max_patches=largest)
    plan = Plan(data, seed, step_config(global_packs=packs, fill=fill, max_samples=max_samples))
    if not sum(sizes):
        assert plan.steps_in_epoch(epoch) == 0
        return
    seen: list[int] = []
    for step in all_steps(plan, epoch):
        assert len(step) == packs
        for pack in step:
            assert pack.num_tokens == data.num_tokens[list(pack.samples)].sum() <= 100
            assert pack.num_patches == data.num_patches[list(pack.samples)].sum() <= 400
            seen += pack.samples
        in_step = sum(len(pack.samples) for pack in step)
        assert 0 < in_step <= (max_samples or in_step)
    assert sorted(seen) == list(range(sum(sizes)))


def test_weights_repeat_and_thin_out_sources():
    plan = Plan(table([30, 40], weights=[2.0, 0.5]), 0, step_config())
    counts = Counter(row for step in all_steps(plan, 0) for pack in step for row in pack.samples)
    assert all(counts[row] == 2 for row in range(30))
    assert sum(counts[row] for row in range(30, 70)) == samples_per_epoch(40, 0.5) == 20


def test_samples_larger_than_a_pack_are_listed_and_in_no_step():
    data = table([50], max_tokens=130, max_patches=500)
    plan = Plan(data, 0, step_config())
    expected = [i for i in range(50) if data.num_tokens[i] > 100 or data.num_patches[i] > 400]
    assert expected
    assert list(plan.oversized_samples) == expected
    seen = [row for step in all_steps(plan, 0) for pack in step for row in pack.samples]
    assert sorted(seen + expected) == list(range(50))


def test_a_resumed_plan_and_every_world_give_the_packs_of_a_straight_run():
    data = table([60, 25], seed=5)
    straight = Plan(data, 7, step_config())
    cursor, steps = Cursor(), []
    for number in range(2 * straight.steps_in_epoch(0)):  # past the end of an epoch
        assert straight.cursor_at(number) == cursor
        steps.append(straight.step_packs(cursor))
        cursor = straight.advance(cursor)
    assert cursor.epoch > 0
    for first in range(0, len(steps), 3):
        fresh = Plan(data, 7, step_config())
        assert fresh.step_packs(fresh.cursor_at(first)) == steps[first]
        for dp_size in (1, 2, 4):
            shares = [pack for rank in range(dp_size) for pack in rank_packs(steps[first], rank, dp_size)]
            assert sorted(pack.samples for pack in shares) == sorted(pack.samples for pack in steps[first])
    assert pickle.loads(pickle.dumps(straight)).step_packs(Cursor()) == steps[0]


def test_total_steps_counts_fractions_of_an_epoch():
    plan = Plan(table([80]), 0, step_config())
    one, two = plan.steps_in_epoch(0), plan.steps_in_epoch(1)
    assert plan.total_steps(1.0) == one
    assert plan.total_steps(1.5) == one + round(two / 2)
    assert plan.total_steps(1e-9) == 1


@pytest.mark.parametrize(
    ("change", "seed"),
    [
        ({}, 1),
        ({"global_packs": 8}, 0),
        ({"fill": 0.9}, 0),
        ({"max_samples": 5}, 0),
        ({"max_tokens": 101}, 0),
    ],
)
def test_the_fingerprint_differs_where_the_plan_may(change, seed):
    data = table([20])
    assert Plan(data, 0, step_config()).fingerprint == Plan(table([20]), 0, step_config()).fingerprint
    assert Plan(data, seed, step_config(**change)).fingerprint != Plan(data, 0, step_config()).fingerprint


def test_caps_on_visual_items_hold():
    data = dataclasses.replace(table([200], seed=2), num_items=np.arange(200) % 5)
    plan = Plan(data, 0, step_config(max_visual_items=4))
    packs = [pack for step in all_steps(plan, 0) for pack in step]
    assert max(data.num_items[list(pack.samples)].sum() for pack in packs) == 4
    assert sorted(row for pack in packs for row in pack.samples) == list(range(200))
    assert Plan(data, 0, step_config(max_visual_items=3)).oversized_samples == tuple(range(4, 200, 5))


def test_bounds_and_blocks_are_of_the_plan():
    data = dataclasses.replace(table([90, 30]), shards=np.repeat(np.arange(12), 10))
    free = Plan(data, 0, step_config())
    blocks = Plan(data, 0, step_config(), order=OrderRules(max_epoch_samples=40, block_shards=2))
    assert free.fingerprint != blocks.fingerprint
    assert sum(len(pack.samples) for step in all_steps(blocks, 0) for pack in step) == 40
    seen = Counter(
        row
        for epoch in range(3)
        for step in all_steps(blocks, epoch)
        for pack in step
        for row in pack.samples
    )
    assert sorted(seen) == list(range(120))
    assert set(seen.values()) == {1}


def test_where_a_step_lies_is_counted_from_a_cursor_near_it():
    plan = Plan(table([80]), 0, step_config())
    for step in range(3 * plan.steps_in_epoch(0)):
        straight = plan.cursor_at(step)
        for near in (Cursor(), plan.cursor_at(step // 2), plan.cursor_at(step + 5)):
            assert plan.cursor_at(step, near=near) == straight


def test_costs_that_overflow_are_refused():
    with pytest.raises(ValueError, match="take a larger unit"):
        Plan(
            table([5]),
            0,
            step_config(),
            costs=dict.fromkeys(("token", "token_pair", "patch", "patch_pair"), 10**10),
        )


def test_other_costs_are_another_plan():
    costs = {"token": 1, "token_pair": 0, "patch": 0, "patch_pair": 0}
    assert (
        Plan(table([20]), 0, step_config(), costs=costs).fingerprint
        != Plan(table([20]), 0, step_config()).fingerprint
    )


def test_the_packs_of_one_plan_are_the_same_today_and_tomorrow():
    """Golden: whoever changes what a plan gives must raise plan.RULES, or old runs would resume wrongly."""
    plan = Plan(table([9, 5], seed=1), 3, step_config(global_packs=2))
    packs = [pack.samples for step in all_steps(plan, 0) for pack in step]
    assert packs == [(7, 0, 1), (10, 11, 5, 12), (13,), (4,), (6,), (2,), (3,), (8,), (9,), ()]
