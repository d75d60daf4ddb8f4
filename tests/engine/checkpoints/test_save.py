"""Old checkpoints go only when a newer one is whole; a disk that is full is told from a fault of the code."""

from __future__ import annotations

import errno
import random

import torch
from safetensors import SafetensorError

from tests.engine.checkpoints.made import make
from vl3train.config.optim_options import OptimConfig
from vl3train.engine.bad_steps.record import BadSteps
from vl3train.engine.checkpoints.keep import Keep, delete_old
from vl3train.engine.checkpoints.manifest import checkpoint_name
from vl3train.engine.zero.state_files import StateFiles, is_of_the_disk


def test_only_the_last_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    delete_old(tmp_path, newest="step_00000004", keep=Keep(last=2, before=3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


def test_a_damaged_one_of_a_later_step_does_not_push_out_what_is_saved_now(tmp_path):
    for step in (1, 2, 6):
        make(tmp_path, step)
    delete_old(tmp_path, newest="step_00000002", keep=Keep(last=1, before=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000002", "step_00000006"]


def test_one_stays_that_the_run_may_go_back_to(tmp_path):
    for step in (10, 20, 25):
        make(tmp_path, step)
    delete_old(tmp_path, newest="step_00000025", keep=Keep(last=1, before=9))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000010", "step_00000025"], "the oldest"
    make(tmp_path, 30)
    delete_old(tmp_path, newest="step_00000030", keep=Keep(last=2, before=26))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000025", "step_00000030"], "one of the two"
    make(tmp_path, 40)
    delete_old(tmp_path, newest="step_00000040", keep=Keep(last=1, before=29))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000025", "step_00000040"], "and one before"


def test_a_stopped_run_can_go_back_wherever_one_can_that_is_not_stopped(tmp_path):
    """``in_a_row`` bad steps end at any step; the stopped run has saved at other steps too."""
    rng = random.Random(0)
    for case in range(40):
        save_steps, in_a_row, keep = rng.randint(1, 12), rng.randint(1, 5), rng.randint(1, 3)
        stops = set(rng.sample(range(1, 60), rng.randint(1, 6)))
        found = []
        for name, saves in (("straight", set()), ("stopped", stops)):
            folder, can = tmp_path / f"{case}-{name}", set()
            for step in range(1, 60):
                bad = BadSteps(OptimConfig(max_skipped_steps=in_a_row))
                bad.in_a_row, bad.row_start = in_a_row, step - in_a_row
                first, _ = bad.range_to_pass_over(step)
                if any(one.name <= checkpoint_name(first) for one in folder.glob("*")):
                    can.add(step)
                if step % save_steps == 0 or step in saves:
                    (folder / checkpoint_name(step)).mkdir(parents=True)
                    delete_old(
                        folder,
                        newest=checkpoint_name(step),
                        keep=Keep(last=keep, before=bad.keep_before(step)),
                    )
            found.append(can)
        assert found[0] <= found[1], (save_steps, in_a_row, keep, stops)


def test_the_best_and_every_so_many_are_kept_too(tmp_path):
    for step in (10, 20, 30, 40, 50, 60):
        make(tmp_path, step)
    delete_old(tmp_path, newest="step_00000060", keep=Keep(last=1, before=60, every=30, best=20))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000020", "step_00000030", "step_00000060"]


def test_a_full_disk_is_told_from_a_fault_of_the_code():
    assert is_of_the_disk(OSError(28, "No space left on device"))
    assert is_of_the_disk(SafetensorError("I/O error: No space left on device (os error 28)"))
    torchs = "[enforce fail at inline_container.cc:672] . unexpected pos 13376 vs 13268"
    assert is_of_the_disk(RuntimeError(torchs))
    assert not is_of_the_disk(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_state_file_that_the_disk_does_not_take_is_kept_as_the_problem():
    files = StateFiles()
    files.save({"weights": torch.zeros(200_000)}, "/dev/full")
    assert is_of_the_disk(files.problem)
    assert isinstance(files.problem, RuntimeError) or files.problem.errno == errno.ENOSPC
