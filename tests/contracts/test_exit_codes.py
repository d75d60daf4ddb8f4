"""What each rank's exit code makes of the launch's: the doctests, and a rank's file."""

from __future__ import annotations

import doctest

from tests.contracts.full_disk import files_of_at_most
from vl3train.contracts import exit_codes
from vl3train.contracts.exit_codes import CODES_FOLDER, FAILED, STOPPED, codes_in, leave_code, left_code


def test_the_examples():
    assert doctest.testmod(exit_codes).failed == 0


def test_a_rank_leaves_its_last_code(tmp_path, monkeypatch):
    (tmp_path / "rank-3").touch()  # a record
    monkeypatch.setenv(CODES_FOLDER, str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert left_code() is None
    leave_code(FAILED)
    leave_code(STOPPED)
    assert left_code() == STOPPED
    assert codes_in(tmp_path) == {STOPPED}


def test_a_full_disk_takes_the_code(tmp_path, monkeypatch):
    monkeypatch.setenv(CODES_FOLDER, str(tmp_path))
    with files_of_at_most(0):
        leave_code(STOPPED)
    assert codes_in(tmp_path) == {STOPPED}
