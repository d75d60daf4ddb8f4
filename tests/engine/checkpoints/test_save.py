"""Old checkpoints go only when a newer one is whole; a disk that is full is told from a fault of the code."""

from __future__ import annotations

import errno

import torch
from safetensors import SafetensorError

from tests.engine.checkpoints.made import make
from vl3train.engine.checkpoints.save import delete_old
from vl3train.engine.zero.state_files import StateFiles, is_of_the_disk


def test_only_the_last_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    delete_old(tmp_path, newest="step_00000004", keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


def test_a_damaged_one_of_a_later_step_does_not_push_out_what_is_saved_now(tmp_path):
    for step in (1, 2, 6):
        make(tmp_path, step)
    delete_old(tmp_path, newest="step_00000002", keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000002", "step_00000006"]


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
