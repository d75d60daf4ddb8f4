"""A value is read under its whole key, from a file that is whole, and from nowhere else."""

from __future__ import annotations

import json

import pytest

from vl3train.contracts.kept import FOLDER, forget, keep, kept_folder, read_kept

KEY = {"gpu": "some", "torch": "2.11", "heads": 4}


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return tmp_path / "kept"


@pytest.mark.parametrize("name", KEY)
def test_a_key_of_which_one_part_differs_is_another(name):
    keep(KEY, {"dq": 0.002})
    assert read_kept({**KEY, name: "other"}) is None
    assert read_kept(dict(reversed(KEY.items()))) == {"dq": 0.002}, "in any order"
    forget(KEY)
    assert read_kept(KEY) is None
    forget(KEY)


def test_a_file_of_another_key_or_damaged_is_as_none(folder):
    keep(KEY, True)
    (file,) = folder.iterdir()
    right = file.read_bytes()
    other = json.dumps({"key": {**KEY, "torch": "2.14"}, "value": True}).encode()
    for bad in (other, right[:-5], b"", b"[]", b"\xff", b"{}", b"[" * 100_000):
        file.write_bytes(bad)
        assert read_kept(KEY) is None, bad[:20]
    keep(KEY, True)
    assert file.read_bytes() == right
    assert [path.name for path in folder.iterdir()] == [file.name], "no partial file"


def test_a_folder_that_another_user_may_write_to_is_not_used(monkeypatch, tmp_path):
    monkeypatch.delenv(FOLDER)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    keep(KEY, True)
    assert read_kept(KEY) is True
    kept_folder().parent.chmod(0o777)
    assert kept_folder() is None
    assert read_kept(KEY) is None
    keep(KEY, True)


def test_a_disk_that_takes_nothing_keeps_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv(FOLDER, str(tmp_path / "file"))
    keep(KEY, True)
    assert read_kept(KEY) is None
