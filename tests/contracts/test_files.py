"""What is written is whole or absent."""

from __future__ import annotations

import os

import pytest

from vl3train.contracts import files
from vl3train.contracts.files import whole_file, whole_folder, write_whole


def fail_half_way(path):
    with whole_file(path) as partial:
        partial.write_text("half")
        (path / "none").read_text()


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    with whole_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with pytest.raises(NotADirectoryError):
        fail_half_way(path)
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_only_what_can_be_computed_again_is_left_to_the_system_to_sync(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync", synced.append)
    for name, durable in (("cache", False), ("weights", True)):
        with files.whole_file(tmp_path / name, durable=durable) as partial:
            partial.write_text("1")
    assert sorted(os.listdir(tmp_path)) == ["cache", "weights"]
    assert [path.name for path in synced] == [f"weights.{os.getpid()}.partial", tmp_path.name]


def test_a_folder_appears_when_it_is_whole_and_what_a_killed_process_left_is_not_in_it(tmp_path):
    path = tmp_path / "out" / "weights"
    (tmp_path / "out" / ".weights.partial").mkdir(parents=True)
    (tmp_path / "out" / ".weights.partial" / "left").touch()
    with whole_folder(path) as partial:
        (partial / "a").write_text("1")
        assert not path.exists()
    assert [file.name for file in path.iterdir()] == ["a"]
    assert os.listdir(tmp_path / "out") == ["weights"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_folder_that_failed(tmp_path, error):
    def fail():
        with whole_folder(tmp_path / "weights") as partial:
            (partial / "a").write_text("1")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert os.listdir(tmp_path) == []
