"""The order is exact: nothing twice, nothing missing, sources evenly spread, the same on every call."""

from __future__ import annotations

import doctest

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vl3train.data import order
from vl3train.data.order import epoch_order, samples_per_epoch, stream_slice


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
