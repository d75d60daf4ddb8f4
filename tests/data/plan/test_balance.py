"""The compiled planner equals plain Python; caps hold; nothing is lost or repeated; what was cut packs again."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data import reference_packing as reference
from vl3train.data.plan import balance
from vl3train.data.plan.cut import cut_epoch

COSTS = np.array([3100, 86, 820, 124], np.int64)
CAPS = np.array([100, 400, 9], np.int64)


def drawn(count: int, seed: int, *, longest: int = 100, share_visual: float = 0.6) -> balance.Columns:
    """Samples that each fit a pack."""
    rng = np.random.default_rng(seed)
    visual = rng.random(count) < share_visual
    tokens = rng.integers(1, longest + 1, count)
    patches = np.where(visual, np.minimum(rng.integers(1, 5, count) * tokens, CAPS[1]), 0)
    items = np.where(visual, rng.integers(1, 4, count), 0)
    return balance.Columns(
        tokens.astype(np.int32),
        patches.astype(np.int32),
        items.astype(np.int32),
        patches.astype(np.int64) ** 2 // np.maximum(items, 1),
        fewer_pairs=np.zeros(1, np.int64),
        records=np.ones(1, np.int32),
    )


def rules_of(columns: balance.Columns, num_packs: int) -> balance.Rules:
    tokens, patches, _, pairs = (values.astype(np.int64) for values in columns[:4])
    language, encoder = COSTS[0] * tokens + COSTS[1] * tokens**2, COSTS[2] * patches + COSTS[3] * pairs
    share = 90 / max(1, tokens.sum())
    parts = [max(1, int(part.sum() * share)) for part in (language + encoder, language, encoder)]
    return balance.Rules(num_packs, CAPS, COSTS, np.array([*parts, CAPS[0], CAPS[1]], np.int64))


def cut(columns, num_packs, fill, max_samples, seed=0):
    order = np.random.default_rng(seed).permutation(len(columns.tokens)).astype(np.int32)
    aims = np.array([int(fill * num_packs * int(cap)) for cap in CAPS], np.int64)
    rules = rules_of(columns, num_packs)
    cut_order, bounds = cut_epoch(order, columns, rules, aims, max_samples)
    return order, cut_order, bounds, aims, rules


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 60),
    seed=st.integers(0, 10_000),
    longest=st.integers(1, 100),
    num_packs=st.integers(1, 7),
    fill=st.floats(0.3, 1.0),
    max_samples=st.integers(1, 80),
)
def test_the_compiled_planner_is_the_plain_one(count, seed, longest, num_packs, fill, max_samples):
    columns = drawn(count, seed, longest=longest)
    order, cut_order, bounds, aims, rules = cut(columns, num_packs, fill, max_samples, seed)
    samples = [tuple(int(values[i]) for values in columns[:4]) for i in range(count)]
    rest = (COSTS.tolist(), rules.means.tolist(), num_packs, CAPS.tolist())
    steps = reference.cut(order.tolist(), samples, *rest, aims.tolist(), max_samples)
    ends = bounds.tolist()
    assert [cut_order[a:b].tolist() for a, b in itertools.pairwise(ends)] == steps
    for rows in steps:
        found = balance.pack_step(np.array(rows, np.int32), columns, rules)
        measured = [reference.measured(samples[row], *rest[:2]) for row in rows]
        first = reference.assigned(measured, *rest[2:])
        assert None not in first
        assert found.tolist() == reference.improved(measured, first, *rest[2:])


@pytest.mark.parametrize("num_packs", [1, 3, 16])
@pytest.mark.parametrize("longest", [3, 40, 52, 100])
def test_every_step_keeps_its_caps_and_nothing_is_lost(num_packs, longest):
    columns = drawn(1500, 3, longest=longest)
    order, cut_order, bounds, aims, rules = cut(columns, num_packs, 0.95, 64)
    assert sorted(cut_order.tolist()) == sorted(order.tolist())
    for first, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        rows = cut_order[first:end]
        assert 0 < len(rows) <= 64
        found = balance.pack_step(rows, columns, rules)
        assert found.min() >= 0
        for values, cap, aim in zip(columns, CAPS, aims, strict=False):
            assert np.bincount(found, values[rows]).max() <= cap
            assert values[rows].sum() <= aim or len(rows) == 1


def test_samples_of_which_one_fits_a_pack_fill_all_packs_of_every_step():
    """What a step cannot place waits for the next one; no step runs with empty packs."""
    columns = drawn(400, 0, share_visual=0)
    columns.tokens[:] = 60
    _, _, bounds, _, _ = cut(columns, 8, 0.95, 10**9)
    assert set(np.diff(bounds).tolist()) == {8}


def test_exchanges_only_improve():
    columns = drawn(3000, 5)
    _, cut_order, bounds, _, rules = cut(columns, 8, 0.97, 10**9)
    before, after = [], []
    for first, end in zip(bounds.tolist()[:-2], bounds.tolist()[1:], strict=False):
        measured = balance.measure(cut_order[first:end], columns, rules)
        found, held = balance.assign(measured, 8, CAPS)
        before.append(held[balance.WORK].max())
        balance.improve(measured, found, held, CAPS)
        after.append(held[balance.WORK].max())
        for column in range(8):  # what packs hold is still the sum of what is in them
            assert np.bincount(found, measured[:, column], 8).tolist() == held[column].tolist()
    assert all(b <= a + balance.SLACK for a, b in zip(before, after, strict=True))
    assert np.mean(after) < np.mean(before)


def test_a_planted_fault_is_seen():
    """The comparison with plain Python would notice another order of equal samples."""
    samples = [[5, 0, 0, 9, 9, 0, 1, 0], [5, 0, 0, 9, 9, 0, 1, 0]]
    assert reference.placed(samples, False, 2, [10, 10, 9]) == [0, 1]
    assert balance.place(np.array(samples), False, 2, CAPS)[0].tolist() == [0, 1]
