"""Mean packs follow the limits of a step; ranks get equal shares."""

from __future__ import annotations

import doctest

import pytest

from vl3train.config.schema import StepConfig
from vl3train.contracts.records import Pack
from vl3train.data.plan import costs as plan_costs
from vl3train.data.plan.costs import cost_numbers, mean_pack, rank_packs


def test_doctests():
    assert doctest.testmod(plan_costs).failed == 0


def test_a_mean_pack_is_what_the_first_limit_of_a_step_allows():
    sums = {
        "token": 1000,
        "token_pair": 200_000,
        "patch": 4000,
        "patch_pair": 10_000,
        "item": 10,
        "record": 10,
    }
    costs = cost_numbers({"token": 2, "token_pair": 3, "patch": 5, "patch_pair": 7})
    language, encoder = 2 * 1000 + 3 * 200_000, 5 * 4000 + 7 * 10_000

    def work(**limits: int | float | None) -> list[int]:
        step = StepConfig(
            **({"max_tokens": 100, "max_patches": 800, "global_packs": 2, "fill": 1.0} | limits)
        )
        return mean_pack(sums, 10, costs, step).tolist()

    # Ten samples; two packs of 100 tokens hold a fifth of the tokens: one sample a pack.
    assert work(max_samples=None) == [(language + encoder) // 10, language // 10, encoder // 10, 100, 800]
    assert work(max_samples=None, max_patches=200)[2] == encoder // 20  # patches close first
    assert work(max_samples=1)[1] == language // 20
    assert work(max_samples=None, max_visual_items=1, fill=0.5)[1] == language // 20


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
