"""Old checkpoints go only when a newer one is whole; a disk that is full is told from a fault of the code."""

from __future__ import annotations

import errno
import random

import pytest
import torch
from safetensors import SafetensorError

from tests.engine.checkpoints.made import make
from vl3train.config.optim_options import OptimConfig
from vl3train.engine.bad_steps.record import BadSteps
from vl3train.engine.checkpoints.keep import Keep, delete_old
from vl3train.engine.checkpoints.save import finish
from vl3train.engine.zero.engine_state import FOLDER, EngineState
from vl3train.engine.zero.state_files import is_of_the_disk
from vl3train.model.weights.headers.manifest import checkpoint_name, digests_of, list_files


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
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("step_00000025", "step_00000030", "step_00000040"),
    ], "and one before, and the next to take its place"


def test_the_one_that_the_run_may_go_back_to_does_not_stay_that_of_the_first_save(tmp_path):
    """Saves every 5 steps, and a way back of 16: each save deletes what the save after the next would need."""
    for step in range(5, 1001, 5):
        make(tmp_path, step)
        delete_old(tmp_path, newest=checkpoint_name(step), keep=Keep(last=1, before=step - 16))
        back = [
            name for one in tmp_path.iterdir() if (name := one.name) <= checkpoint_name(max(5, step - 16))
        ]
        assert checkpoint_name(max(5, step - 2 * (16 + 5))) <= max(back)
        assert len(list(tmp_path.iterdir())) <= 3


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


def test_of_a_checkpoint_that_was_moved_to_another_disk_only_the_link_goes(tmp_path):
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    moved = make(elsewhere, 10)
    folder.mkdir()
    (folder / "step_00000010").symlink_to(moved)
    (folder / "step_00000020").symlink_to(tmp_path / "a disk that is gone")
    make(folder, 30)
    delete_old(folder, newest="step_00000030", keep=Keep(last=1, before=30))
    assert [path.name for path in folder.iterdir()] == ["step_00000030"]
    assert list(moved.iterdir())


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_undo_a_save(tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    for step in (10, 20):
        make(tmp_path, step)
    make(tmp_path, 30).rename(partial := tmp_path / "step_00000030.partial")
    monkeypatch.setattr("shutil.rmtree", refuse)
    sizes = list_files(partial)
    finish(partial, tmp_path / "step_00000030", digests_of(partial, sizes), Keep(last=1, before=30))
    assert (tmp_path / "latest").read_text() == "step_00000030"
    assert "an old checkpoint could not be deleted: [Errno 16]" in capsys.readouterr().err


def test_a_full_disk_is_told_from_a_fault_of_the_code():
    assert is_of_the_disk(OSError(28, "No space left on device"))
    assert is_of_the_disk(SafetensorError("I/O error: No space left on device (os error 28)"))
    torchs = "[enforce fail at inline_container.cc:672] . unexpected pos 13376 vs 13268"
    assert is_of_the_disk(RuntimeError(torchs))
    assert not is_of_the_disk(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_state_file_that_the_disk_does_not_take_is_a_fault_of_the_disk(tmp_path):
    state = EngineState({"full": {"weights": torch.zeros(200_000)}}, {})
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "full").symlink_to("/dev/full")
    with pytest.raises((OSError, RuntimeError)) as caught:
        state.write(tmp_path)
    assert is_of_the_disk(caught.value)
