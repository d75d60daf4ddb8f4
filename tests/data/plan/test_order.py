"""The order is exact: nothing twice, nothing missing, sources evenly spread, the same on every call."""

from __future__ import annotations

import doctest

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vl3train.data.plan import order
from vl3train.data.plan.order import OrderRules, epoch_counts, epoch_order, samples_per_epoch, stream_slice


def test_doctests():
    assert doctest.testmod(order).failed == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=5), st.integers(0, 9), st.integers(0, 3))
def test_at_weight_one_an_epoch_holds_every_sample_once(sizes, seed, epoch):
    rows = epoch_order(sizes, [1.0] * len(sizes), seed=seed, epoch=epoch)
    assert sorted(rows.tolist()) == list(range(sum(sizes)))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.floats(0.05, 3.5), st.integers(0, 9))
def test_a_weighted_source_repeats_a_sample_only_when_all_others_came(size, weight, seed):
    count = samples_per_epoch(size, weight)
    epochs = [epoch_order([size], [weight], seed=seed, epoch=epoch) for epoch in range(4)]
    assert all(len(rows) == count for rows in epochs)
    stream = np.concatenate(epochs)
    for first in range(0, len(stream) - size + 1, size):
        assert sorted(stream[first : first + size].tolist()) == list(range(size))


def test_epochs_and_seeds_and_sources_differ():
    first = stream_slice(100, 0, 100, seed=0, source=0).tolist()
    assert first != stream_slice(100, 100, 100, seed=0, source=0).tolist()
    assert first != stream_slice(100, 0, 100, seed=1, source=0).tolist()
    assert first != stream_slice(100, 0, 100, seed=0, source=1).tolist()


def test_every_stretch_holds_the_sources_in_proportion():
    rows = epoch_order([900, 100], [1.0, 1.0], seed=3, epoch=0)
    for first in range(0, 1000, 100):
        assert np.sum(rows[first : first + 100] >= 900) == 10


def test_bounded_epochs_go_on_where_the_last_one_ended():
    rules = OrderRules(max_epoch_samples=50)
    assert epoch_counts([100, 300], [1.0, 1.0], 50) == [12, 38]
    epochs = [epoch_order([100, 300], [1.0, 1.0], seed=0, epoch=epoch, rules=rules) for epoch in range(8)]
    first = np.concatenate([rows[rows < 100] for rows in epochs])
    assert len(np.unique(first)) == len(first) == 96  # nothing comes again before all came
    assert first.tolist() == stream_slice(100, 0, 96, seed=0, source=0).tolist()
    assert len(epoch_order([20, 20], [1.0, 1.0], seed=0, epoch=0, rules=rules)) == 40


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 5))
def test_blocks_hold_every_sample_once_and_open_few_shards(samples_of_shards, block, seed):
    shards = np.repeat(np.arange(len(samples_of_shards)), samples_of_shards)
    rules = OrderRules(block_shards=block)
    rows = epoch_order([len(shards)], [1.0], seed=seed, epoch=0, rules=rules, shards=shards)
    assert sorted(rows.tolist()) == list(range(len(shards)))
    windows = [set(chunk) for chunk in _windows(shards[rows].tolist(), block)]
    assert all(len(window) <= block for window in windows)
    assert len(windows) <= -(-len(samples_of_shards) // block) + 1


def _windows(shards: list[int], block: int) -> list[list[int]]:
    """Cuts where the next sample would open one shard more than a window may have."""
    windows: list[list[int]] = [[]]
    for shard in shards:
        if shard not in windows[-1] and len(set(windows[-1])) == block:
            windows.append([])
        windows[-1].append(shard)
    return windows


def test_blocks_shuffle_shards_and_samples_and_differ_from_pass_to_pass():
    shards = np.repeat(np.arange(20), 50)
    rules = OrderRules(block_shards=4)
    passes = [epoch_order([1000], [1.0], seed=0, epoch=e, rules=rules, shards=shards) for e in range(2)]
    opened = [set(shards[rows[:200]].tolist()) for rows in passes]
    assert [len(found) for found in opened] == [4, 4]
    assert opened[0] != opened[1]
    assert np.abs(np.diff(shards[passes[0][:200]])).astype(bool).mean() > 0.5  # shards of a window are mixed
