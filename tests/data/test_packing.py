"""Packs keep their caps and balance; ranks get equal shares."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl3train.contracts.records import Pack
from vl3train.data import packing
from vl3train.data.packing import pack_samples, rank_packs


def test_doctests():
    assert doctest.testmod(packing).failed == 0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 10), st.integers(0, 10)), min_size=1, max_size=24),
    st.integers(1, 8),
)
def test_caps_hold_and_as_many_samples_as_packs_always_fit(sizes, packs):
    tokens, patches = [t for t, _ in sizes], [p for _, p in sizes]
    costs = [3 * t * t + p for t, p in sizes]
    found = pack_samples(tokens, patches, costs, packs=packs, caps=(10, 10))
    if found is None:
        assert len(sizes) > packs
        return
    for pack in range(packs):
        assert sum(t for t, a in zip(tokens, found, strict=True) if a == pack) <= 10
        assert sum(p for p, a in zip(patches, found, strict=True) if a == pack) <= 10


def test_what_balance_cannot_place_best_fit_does():
    # By cost 4 and 4 would go to different packs, and the two 6 beside them would leave no room for 5 + 5.
    tokens = [4, 4, 6, 6, 5, 5]
    found = pack_samples(tokens, [0] * 6, [9, 9, 1, 1, 8, 8], packs=3, caps=(10, 10))
    assert found is not None
    assert [sum(t for t, a in zip(tokens, found, strict=True) if a == pack) for pack in range(3)] == [10] * 3


@pytest.mark.parametrize("dp_size", [1, 2, 4, 8])
def test_ranks_share_the_packs_equally_and_run_the_costliest_first(dp_size):
    packs = [
        Pack(samples=(i,), num_tokens=1, num_patches=0, num_supervised_tokens=1, cost=(i * 7) % 11)
        for i in range(8)
    ]
    shares = [rank_packs(packs, rank, dp_size) for rank in range(dp_size)]
    assert {len(share) for share in shares} == {8 // dp_size}
    assert sorted(pack.samples[0] for share in shares for pack in share) == list(range(8))
    for share in shares:
        assert [pack.cost for pack in share] == sorted((pack.cost for pack in share), reverse=True)


def test_a_world_that_does_not_divide_is_refused_with_its_numbers():
    with pytest.raises(ValueError, match="global_packs=3 does not divide over 2"):
        rank_packs([Pack(samples=(), num_tokens=0, num_patches=0, num_supervised_tokens=0, cost=0)] * 3, 0, 2)
