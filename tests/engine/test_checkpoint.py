"""Checkpoints are whole or absent, and other plans or models are refused with what differs."""

from __future__ import annotations

import json

import pytest
from safetensors import SafetensorError

from vl3train.engine.checkpoint import (
    checkpoint_damage,
    delete_old,
    is_of_the_disk,
    list_files,
    newest_whole,
    random_state,
    refuse_other_identity,
    set_random_state,
)
from vl3train.engine.ranks import RunError


def make(checkpoints, step, identity=None):
    folder = checkpoints / f"step_{step:08d}"
    (folder / "engine").mkdir(parents=True)
    (folder / "engine" / "weights.bin").write_bytes(b"x" * 100)
    (folder / "resume.json").write_text(
        json.dumps({"identity": identity or {"plan": {"seed": 0}}, "step": step})
    )
    (folder / "MANIFEST.json").write_text(json.dumps(list_files(folder)))
    return folder


def test_the_newest_whole_checkpoint_is_found_and_damage_is_named(tmp_path):
    make(tmp_path, 10)
    cut = make(tmp_path, 20)
    (cut / "engine" / "weights.bin").write_bytes(b"x" * 60)
    unfinished = make(tmp_path, 30)
    (unfinished / "MANIFEST.json").unlink()
    (make(tmp_path, 35) / "MANIFEST.json").write_text("")
    (tmp_path / "step_00000040.partial").mkdir()
    name, remarks = newest_whole(tmp_path)
    assert name == "step_00000010"
    assert "60 of 100 bytes" in " ".join(remarks)
    assert "no MANIFEST.json" in " ".join(remarks)
    assert "MANIFEST.json is not JSON" in " ".join(remarks)


def test_no_checkpoint_is_no_error(tmp_path):
    assert newest_whole(tmp_path / "none") == (None, [])


def test_a_missing_file_is_damage(tmp_path):
    folder = make(tmp_path, 1)
    assert checkpoint_damage(folder) is None
    (folder / "engine" / "weights.bin").unlink()
    assert "weights.bin has no of 100 bytes" in checkpoint_damage(folder)


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


def test_another_plan_is_refused_with_every_difference(tmp_path):
    folder = make(
        tmp_path, 1, identity={"plan": {"seed": 0, "index": "abc"}, "stage": 2, "model": {"projector": 7}}
    )
    same = refuse_other_identity(
        folder, {"plan": {"seed": 0, "index": "abc"}, "stage": 2, "model": {"projector": 7}}
    )
    assert same["step"] == 1
    with pytest.raises(RunError, match="cannot be resumed") as caught:
        refuse_other_identity(
            folder, {"plan": {"seed": 1, "index": "abc"}, "stage": 2, "model": {"projector": 8}}
        )
    text = str(caught.value)
    assert "plan.seed: the checkpoint has 0, this run has 1" in text
    assert "model.projector: the checkpoint has 7, this run has 8" in text
    assert "index" not in text.split("Either")[0].replace("plan.index", "")
    assert "stage.init_from" not in text, "there are no weights"
    (folder / "weights").mkdir()
    with pytest.raises(RunError, match=f"stage.init_from={folder / 'weights'}"):
        refuse_other_identity(folder, {"stage": 2})
    with pytest.raises(RunError) as caught:
        refuse_other_identity(folder, {"stage": 1})
    assert "stage.init_from" not in str(caught.value), "stage 1 does not take it"


def test_random_state_comes_back():
    import random

    import numpy as np
    import torch

    state = random_state()
    first = (random.random(), np.random.rand(), torch.rand(1).item())
    set_random_state(state)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == first


def test_a_full_disk_is_told_from_a_fault_of_the_code():
    assert is_of_the_disk(OSError(28, "No space left on device"))
    assert is_of_the_disk(SafetensorError("I/O error: No space left on device (os error 28)"))
    torchs = "[enforce fail at inline_container.cc:672] . unexpected pos 13376 vs 13268"
    assert is_of_the_disk(RuntimeError(torchs))
    assert not is_of_the_disk(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
