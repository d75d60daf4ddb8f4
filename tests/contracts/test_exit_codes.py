"""What each rank's exit code makes of the launch's: the doctests, and a rank's file."""

from __future__ import annotations

import doctest

from vl3train.contracts import exit_codes
from vl3train.contracts.exit_codes import CODES_FOLDER, STOPPED, leave_code


def test_the_examples():
    assert doctest.testmod(exit_codes).failed == 0


def test_a_rank_leaves_its_code(tmp_path, monkeypatch):
    monkeypatch.setenv(CODES_FOLDER, str(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "3")
    leave_code(STOPPED)
    assert (tmp_path / "3").read_text() == "75"
