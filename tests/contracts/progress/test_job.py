"""Where the records of a job's ranks lie, where no launcher of ours has a folder for them."""

from __future__ import annotations

import tempfile

import pytest

from vl3train.contracts.exit_codes import CODES_FOLDER
from vl3train.contracts.progress.job import job_folder


def test_records_lie_in_a_folder_that_nobody_else_can_write_to(tmp_path, monkeypatch):
    monkeypatch.delenv(CODES_FOLDER, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = job_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert job_folder() == folder, "another rank finds it"
    folder.chmod(0o777)
    with pytest.raises(RuntimeError, match="not this user's alone: remove it, or set TMPDIR"):
        job_folder()
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RuntimeError, match="not this user's alone"):
        job_folder()
