"""Two runs never write into one folder, and a dead process holds no folder."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vl3train.engine.ranks import RunError
from vl3train.engine.start.lock import LOCK_FILE, lock, locked_folder

HOLD = """
import sys, time
from pathlib import Path
from vl3train.engine.start.lock import lock
lock(Path(sys.argv[1]))
print("held", flush=True)
child = __import__("subprocess").Popen(["sleep", "60"])
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_folder_is_held_until_its_process_ends_however_it_ends(tmp_path, one_rank):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    child = int(process.stdout.readline())
    about = f"is in use by another run: process {process.pid} on "
    with pytest.raises(RunError, match=about), locked_folder(tmp_path, one_rank):
        pass
    process.kill()
    process.wait()
    try:
        with locked_folder(tmp_path, one_rank):
            pass  # although a program that it started is still there
    finally:
        subprocess.run(["kill", str(child)], check=False)


def test_a_lock_file_that_is_removed_is_made_anew_unless_another_run_was_faster(tmp_path, one_rank):
    with locked_folder(tmp_path, one_rank) as held:
        assert held.taken() is None
        (tmp_path / LOCK_FILE).unlink()
        assert held.taken() is None
        with pytest.raises(BlockingIOError):
            lock(tmp_path)
        (tmp_path / LOCK_FILE).unlink()
        os.close(other := lock(tmp_path))
        assert held.taken() is None, "that one has ended"
        (tmp_path / LOCK_FILE).unlink()
        other = lock(tmp_path)
        assert "is in use by another run: process" in held.taken()
        os.close(other)


def test_it_is_free_again_after_the_block(tmp_path, one_rank):
    for _ in range(2):
        with locked_folder(tmp_path, one_rank):
            pass


def test_a_folder_that_cannot_be_made_is_an_error_on_every_rank(tmp_path, one_rank):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RunError, match="cannot be written"),
        locked_folder(tmp_path / "file" / "run", one_rank),
    ):
        pass
