"""Records of a family share packs within the limits; each comes once an epoch, with the cost it has in its family."""

from __future__ import annotations

import dataclasses
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.plan.test_plan import all_steps, step_config
from vl3train.contracts.families import doubled_pairs
from vl3train.contracts.records import Cursor
from vl3train.data.plan.families import what_sharing_saves
from vl3train.data.plan.order import OrderRules
from vl3train.data.plan.plan import Plan
from vl3train.data.plan.sample_table import SampleTable

COSTS = {"token": 3, "token_pair": 2, "patch": 5, "patch_pair": 1}


def table(counts, *, sizes=None, seed=0, weights=None):
    """Records in an order of their own: of family i, numbered from 1, there are ``counts[i]``; some share nothing."""
    rng = np.random.default_rng(seed)
    family = np.repeat(np.arange(len(counts)), counts)
    family = rng.permutation(family)
    prefix = rng.integers(4, 40, len(counts))[family]
    patches = rng.integers(1, 200, len(counts))[family]
    alone = family % 3 == 2
    return SampleTable(
        sizes=tuple(sizes or [len(family)]),
        weights=tuple(weights or [1.0] * len(sizes or [0])),
        num_tokens=prefix + rng.integers(1, 30, len(family)),
        num_supervised_tokens=np.ones(len(family), np.int64),
        num_patches=patches,
        num_patch_pairs=patches**2,
        num_items=np.ones(len(family), np.int64),
        prefix_tokens=np.where(alone, 0, prefix),
        families=np.where(alone, 0, family + 7).astype(np.int64),
        shards=np.arange(len(family)) // 5,
        fingerprint="index",
    )


def plan_of(records, *, most=4, order=OrderRules(), **step):  # noqa: B008 - frozen
    return Plan(records, 3, step_config(**step), costs=COSTS, order=order, max_family_records=most)


def groups_of(plan, epoch=0):
    return [group for step in all_steps(plan, epoch) for pack in step for group in pack.groups]


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    seed=st.integers(0, 1000),
    most=st.integers(1, 6),
    max_samples=st.none() | st.integers(3, 9),
)
def test_each_record_once_within_the_limits(counts, seed, most, max_samples):
    records = table(counts, seed=seed)
    plan = plan_of(records, most=most, max_samples=max_samples)
    seen = Counter()
    for step in all_steps(plan, 0):
        for pack in step:
            tokens = patches = cost = 0
            for group in pack.groups:
                rows, first = list(group), group[0]
                assert len(rows) <= most
                assert len(set(records.families[rows])) == 1
                assert len(rows) == 1 or records.families[first]
                prefix = int(records.prefix_tokens[first]) if len(rows) > 1 else 0
                own = [int(records.num_tokens[row]) - prefix for row in rows]
                lengths, branches = ([prefix, *own], [len(own), *[0] * len(own)]) if prefix else (own, [0])
                tokens, patches = tokens + prefix + sum(own), patches + int(records.num_patches[first])
                cost += 3 * (prefix + sum(own)) + 2 * doubled_pairs(lengths, branches)
                cost += 5 * int(records.num_patches[first]) + int(records.num_patch_pairs[first])
                seen.update(rows)
            assert (pack.num_tokens, pack.num_patches, pack.cost) == (tokens, patches, cost)
            assert pack.num_supervised_tokens == len(pack.samples)
            assert tokens <= 100
            assert patches <= 400
        assert max_samples is None or sum(len(pack.samples) for pack in step) <= max(max_samples, 1)
    assert seen == Counter(range(len(records.families)))


def test_a_family_stays_together_as_far_as_it_fits():
    groups = groups_of(plan_of(table([8, 8, 1]), most=4, max_tokens=300))
    assert sorted(map(len, groups)) == [1, 4, 4, 4, 4]
    assert sorted(map(len, groups_of(plan_of(table([8, 8, 1]), most=8, max_tokens=300)))) == [1, 8, 8]
    assert set(map(len, groups_of(plan_of(table([8, 8, 1]), most=1)))) == {1}


def test_a_step_without_a_limit_of_samples_has_all_that_fit():
    """A step's records are more than the units that they make."""
    plan = plan_of(table([8, 8, 8]), most=8, max_tokens=3000, max_patches=10_000, max_samples=None)
    assert plan.steps_in_epoch(0) == 1
    assert sum(len(pack.samples) for pack in plan.step_packs(Cursor())) == 24


def test_families_of_two_sources_are_never_one():
    records = table([8], sizes=[3, 5])
    for group in groups_of(plan_of(records, most=8, max_tokens=300)):
        assert len({row < 3 for row in group}) == 1


def test_where_nothing_is_shared_the_plan_is_the_same():
    records = table([1] * 60)
    shared, alone = plan_of(records, most=4), plan_of(records, most=1)
    assert all_steps(shared, 0) == all_steps(alone, 0)
    assert shared.units is None
    assert not any(pack.families for step in all_steps(shared, 0) for pack in step)


def test_whoever_asks_gets_the_same_packs():
    """Another process, a resumed run, and one that asks for later epochs first."""
    records = table([5, 3, 9, 1, 2, 6, 4] * 3)
    plan = plan_of(records)
    straight = [plan.step_packs(plan.cursor_at(step)) for step in range(2 * plan.steps_in_epoch(0))]
    assert any(pack.families for step in straight for pack in step)
    sent = pickle.loads(pickle.dumps(plan_of(records)))
    for step in reversed(range(len(straight))):
        assert sent.step_packs(sent.cursor_at(step)) == straight[step]
    assert plan_of(records, most=3).fingerprint != plan.fingerprint


def test_a_bound_on_virtual_epochs_counts_records():
    records = table([8] * 60)
    plan = plan_of(records, most=8, max_tokens=400, order=OrderRules(max_epoch_samples=100))
    epochs = [plan.epoch_rows(epoch) for epoch in range(20)]
    assert np.mean([len(rows) for rows in epochs]) == pytest.approx(100, rel=0.1)
    assert set(np.concatenate(epochs).tolist()) == set(range(480))


@pytest.mark.parametrize("block_shards", [0, 2])
def test_half_a_weight_and_blocks(block_shards):
    records = dataclasses.replace(table([4] * 20), weights=(0.5,))
    plan = plan_of(records, order=OrderRules(block_shards=block_shards))
    rows = np.concatenate([plan.epoch_rows(0), plan.epoch_rows(1)])
    assert Counter(rows.tolist()) == Counter(range(80))
    assert plan.step_packs(Cursor())


@pytest.mark.parametrize("sizes", [None, (100, 91, 9)])
def test_what_sharing_would_save_is_what_it_saves(sizes):
    records = table([8, 2, 3, 1, 6] * 10, sizes=sizes)
    tokens = {
        most: sum(
            pack.num_tokens
            for step in all_steps(plan_of(records, most=most, max_tokens=100), 0)
            for pack in step
        )
        for most in (1, 4)
    }
    found = what_sharing_saves(records, 100, 4)
    assert found.tokens == pytest.approx(1 - tokens[4] / tokens[1]) != 0
    together = [group for group in groups_of(plan_of(records, max_tokens=100)) if len(group) > 1]
    assert found.samples == pytest.approx(sum(map(len, together)) / len(records.families))


def test_of_a_large_index_some_families_tell_what_sharing_saves():
    records = table([4, 1, 3] * 300)
    whole = what_sharing_saves(records, 100, 4)
    part = what_sharing_saves(records, 100, 4, counted=500)
    assert part != whole
    assert part == pytest.approx(whole, rel=0.15)
    nothing = dataclasses.replace(records, families=np.zeros_like(records.families))
    assert what_sharing_saves(nothing, 100, 4) == (0, 0)
