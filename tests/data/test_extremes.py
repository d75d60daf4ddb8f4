from __future__ import annotations

import numpy as np
import pytest

from vl3train.config.schema import StepConfig
from vl3train.contracts.records import Cursor
from vl3train.data import extremes as worst_pack_module
from vl3train.data.extremes import packs_of_many_sizes, worst_pack
from vl3train.data.plan.plan import Plan
from vl3train.data.plan.sample_table import SampleTable


@pytest.fixture
def plan():
    rng = np.random.default_rng(0)
    tokens, patches = rng.integers(10, 90, 200), rng.integers(0, 300, 200)
    table = SampleTable(
        sizes=(200,),
        weights=(1.0,),
        num_tokens=tokens,
        num_supervised_tokens=tokens // 2,
        num_patches=patches,
        num_patch_pairs=patches * patches,
        fingerprint="x",
    )
    return Plan(table, 0, StepConfig(max_tokens=200, max_patches=600, global_packs=3, max_samples=12))


def size(patches, tokens):
    return 3 * patches + tokens


def test_no_pack_of_the_run_takes_more_and_later_epochs_count(plan):
    last = plan.steps_in_epoch(0) + 3
    cursor, packs = Cursor(), []
    for _ in range(last):
        packs += [(size(pack.num_patches, pack.num_tokens), cursor.step) for pack in plan.step_packs(cursor)]
        cursor = plan.advance(cursor)
    worst = worst_pack(plan, Cursor(), last, size)
    found = size(worst.pack.num_patches, worst.pack.num_tokens)
    assert found == max(packs)[0]
    assert (found, worst.step) in packs
    assert worst.steps_scanned == worst.steps_left == last


def test_the_first_steps_of_a_long_run_are_searched_from_where_it_is(plan, monkeypatch):
    monkeypatch.setattr(worst_pack_module, "STEPS_SCANNED", 4)
    first = plan.cursor_at(2)
    worst = worst_pack(plan, first, 1000, size)
    assert (worst.steps_scanned, worst.steps_left) == (4, 998)
    assert 2 <= worst.step < 6
    done = worst_pack(plan, first, 2, size)  # a finished run that is started again
    assert (done.step, done.steps_scanned, done.steps_left) == (2, 1, 1)


def test_many_sizes_are_of_the_packs_to_come_from_the_largest_to_the_smallest(plan, monkeypatch):
    monkeypatch.setattr(worst_pack_module, "STEPS_OF_SIZES", 6)
    cursor, sizes = plan.cursor_at(2), set()
    for _ in range(6):
        sizes |= {pack.num_patches for pack in plan.step_packs(cursor)}
        cursor = plan.advance(cursor)
    found = [pack.num_patches for pack in packs_of_many_sizes(plan, plan.cursor_at(2), 1000, 5)]
    assert found == sorted(found, reverse=True)
    assert len(found) == 5
    assert (found[0], found[-1]) == (max(sizes), min(sizes))
    every = packs_of_many_sizes(plan, plan.cursor_at(2), 3, 5)
    assert sorted(every, key=lambda pack: -pack.num_patches) == every
    assert len(every) == 3, "of the one step that is left"
