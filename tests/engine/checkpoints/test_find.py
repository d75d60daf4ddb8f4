"""A run resumes from the newest whole checkpoint, and never starts over because all are damaged."""

from __future__ import annotations

import pytest

from tests.engine.checkpoints.made import make
from vl3train.engine.checkpoints.find import find_checkpoint
from vl3train.engine.checkpoints.keep import name_latest
from vl3train.engine.ranks import RunError


def test_the_newest_whole_one_is_found_and_damage_is_named(tmp_path, one_rank):
    good = make(tmp_path, 10)
    cut = make(tmp_path, 20)
    (cut / "engine" / "weights.bin").write_bytes(b"x" * 60)
    (make(tmp_path, 30) / "MANIFEST.json").unlink()
    (make(tmp_path, 35) / "MANIFEST.json").write_text("")
    (make(tmp_path, 38) / "engine" / "weights.bin").write_bytes(b"x" * 99 + b"y")
    (tmp_path / "step_00000040.partial").mkdir()
    for name in ("step_old_copy", "step_0000100a", "step_0000000041", "step_99999999 (copy)"):
        make(tmp_path, 50).rename(tmp_path / name)
    folder, remarks = find_checkpoint(tmp_path, one_rank)
    assert folder == good
    assert [remark.split(" is not used: ")[0][-2:] for remark in remarks] == ["38", "35", "30", "20"]
    assert "its digest differs" in remarks[0]
    assert "60 of 100 bytes" in remarks[3]


@pytest.mark.parametrize(
    "name", ["weights/zzz.safetensors", "weights/model.safetensors", "engine/state/more.pt"]
)
def test_a_strange_file_that_would_be_read_is_damage_and_a_note_is_none(tmp_path, one_rank, name):
    good, newest = make(tmp_path, 10), make(tmp_path, 20)
    (newest / "weights").mkdir()
    (newest / "notes.txt").touch()
    (newest / "weights" / "notes.json").touch()
    assert find_checkpoint(tmp_path, one_rank) == (newest, [])
    (newest / name).parent.mkdir(exist_ok=True)
    (newest / name).touch()
    folder, [remark] = find_checkpoint(tmp_path, one_rank)
    assert folder == good
    assert f"{name} is no file of the checkpoint; take it out" in remark


def test_no_checkpoint_is_no_error(tmp_path, one_rank):
    assert find_checkpoint(tmp_path / "none", one_rank) == (None, [])


def test_all_damaged_is_an_error_that_names_each(tmp_path, one_rank):
    for step in (1, 2):
        (make(tmp_path, step) / "engine" / "weights.bin").write_bytes(b"y" * 100)
    with pytest.raises(RunError, match="does not start over") as caught:
        find_checkpoint(tmp_path, one_rank)
    assert str(caught.value).count("its digest differs") == 2
    assert "move" in str(caught.value)


@pytest.mark.parametrize("what", ["a link to ", "a file"])
def test_a_folder_whose_disk_is_away_is_no_start_over(tmp_path, one_rank, what):
    checkpoints = tmp_path / "checkpoints"
    if what == "a file":
        checkpoints.touch()
    else:
        checkpoints.symlink_to(tmp_path / "disk")
    with pytest.raises(RunError, match=f"checkpoints is {what}.*does not start over"):
        find_checkpoint(checkpoints, one_rank)


def test_the_file_that_names_the_newest_is_mended(tmp_path):
    for damage in (lambda: None, lambda: (tmp_path / "latest").write_bytes(b"step_0000\xff")):
        damage()
        name_latest(tmp_path / "step_00000010")
        assert (tmp_path / "latest").read_text() == "step_00000010"
