"""Processes start also where the folder for temporary files has a long path, and leave nothing there."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.engine.jobs import ROOT
from vl3train.data.render.processes import LONGEST_FOLDER

STARTS = """
import torch
from multiprocessing import util
from vl3train.data.render.processes import clean_processes
from vl3train.engine.ranks import leave
from vl3train.data.render.processes import start_workers_ignoring_signals

start_workers_ignoring_signals()
with clean_processes().Pool(1) as pool:
    print(pool.apply(torch.arange, (3,)).tolist(), util.get_temp_dir(), sep="\\n")
leave()
"""
"""As a rank: the fork server, and a tensor from a process of it, which torch passes through a socket of its own."""


@pytest.fixture
def short():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_a_long_folder_for_temporary_files_is_no_obstacle(warm_python, tmp_path, short):
    deep = tmp_path / ("x" * LONGEST_FOLDER)
    deep.mkdir()
    for wanted, used in ((deep, Path("/tmp")), (short, short)):
        done = subprocess.run(
            [*warm_python, "-c", STARTS],
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(wanted)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        numbers, folder = done.stdout.splitlines()
        assert (numbers, Path(folder).parent) == ("[0, 1, 2]", used)
        assert not Path(folder).exists()
    assert not list(deep.iterdir())
