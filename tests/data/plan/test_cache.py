"""A plan from the disk is the plan; what is not whole there is planned again; old orders go."""

from __future__ import annotations

import os
import pickle
import time

import numpy as np
import pytest

from tests.data.plan.test_plan import all_steps, step_config, table
from vl3train.data.plan import cache as plan_cache
from vl3train.data.plan import plan as plan_module
from vl3train.data.plan.plan import Plan


@pytest.fixture(autouse=True)
def _keep_short_epochs_too(monkeypatch):
    monkeypatch.setattr(plan_module, "CACHED_FROM_SAMPLES", 1)


def test_a_mapped_plan_is_the_plan(tmp_path, monkeypatch):
    data = table([60, 25], seed=5)
    made = all_steps(Plan(data, 7, step_config(), cache=tmp_path), 1)
    (folder,) = tmp_path.iterdir()
    assert folder.name == Plan(data, 7, step_config()).fingerprint
    kept = Plan(data, 7, step_config(), cache=tmp_path)
    monkeypatch.setattr(plan_module, "cut_epoch", None)  # nothing is planned again
    assert all_steps(kept, 1) == made
    assert isinstance(kept._epochs[1].order, np.memmap)
    sent = pickle.dumps(kept)
    assert pickle.loads(sent)._epochs == {}  # a worker maps the file itself


@pytest.mark.parametrize("what", ["order", "bounds"])
def test_what_is_damaged_is_told_and_planned_again(tmp_path, what):
    data = table([60], seed=5)
    expected = all_steps(Plan(data, 0, step_config()), 0)
    Plan(data, 0, step_config(), cache=tmp_path).steps_in_epoch(0)
    (file,) = tmp_path.glob(f"*/epoch-0.{what}.npy")
    good = file.read_bytes()
    flipped = bytearray(good)
    flipped[-40] ^= 1  # one sample twice, another never
    for bad in (flipped, good[:-1], good[:20], b"", b"\x80\x04N."):
        file.write_bytes(bad)
        with pytest.warns(UserWarning, match=rf"{what}\.npy is damaged and is made again"):
            assert all_steps(Plan(data, 0, step_config(), cache=tmp_path), 0) == expected
        assert file.read_bytes() == good
    file.unlink()
    assert all_steps(Plan(data, 0, step_config(), cache=tmp_path), 0) == expected


def test_orders_of_old_epochs_go_and_their_step_counts_stay(tmp_path, monkeypatch):
    data = table([60], seed=5)
    plan = Plan(data, 0, step_config(), cache=tmp_path)
    counts = [plan.steps_in_epoch(epoch) for epoch in range(4)]
    assert sorted(file.name for file in tmp_path.glob("*/*.order.npy")) == [
        "epoch-2.order.npy",
        "epoch-3.order.npy",
    ]
    monkeypatch.setattr(plan_module, "cut_epoch", None)
    fresh = Plan(data, 0, step_config(), cache=tmp_path)
    assert [fresh.steps_in_epoch(epoch) for epoch in range(4)] == counts
    assert not list(tmp_path.glob("*/*.partial"))


def test_the_folder_for_caches_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plan_cache.default_folder() == tmp_path / "vl3train" / "plans"


def test_what_nobody_used_for_long_goes_and_nothing_else(tmp_path):
    data = table([60], seed=5)
    Plan(data, 0, step_config(), cache=tmp_path).steps_in_epoch(0)
    (order,) = tmp_path.glob("*/epoch-0.order.npy")
    names = [
        "index-0123.arrow",
        "index-4567.arrow",
        f"{order.parent.name}/epoch-1.bounds.npy",
        "index-8.7.partial",
    ]
    notes = tmp_path / "notes.txt"
    old = [tmp_path / name for name in names]
    for file in (*old, notes):
        file.touch()
    long_ago = time.time() - (plan_cache.UNUSED_DAYS + 1) * 86_400
    for file in (*old, notes, order):
        os.utime(file, (long_ago, long_ago))
    plan_cache.mark_used(old[1])
    Plan(data, 0, step_config(), cache=tmp_path).epoch_rows(0)  # maps the order
    plan_cache.delete_unused(tmp_path)
    assert [file.exists() for file in old] == [False, True, False, False]
    assert order.exists()
    assert notes.exists(), "not ours"
