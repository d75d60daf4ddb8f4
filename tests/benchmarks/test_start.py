"""benchmarks/start.py: what the thread that looks at a start says it is busy with."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys

from benchmarks.starts.timed import WATCH, Started, common_places, timeline

BUSY = """
import time
from vl3train.contracts.progress.record import progress

def waits():
    time.sleep(0.9)

progress.phase("start: data")
waits()
"""


def test_a_rank_is_looked_at_and_another_process_is_not(tmp_path):
    path = os.pathsep.join([str(WATCH), os.getcwd()])
    env = {**os.environ, "PYTHONPATH": path, "VL3TRAIN_WATCH": str(tmp_path)}
    env.pop("RANK", None)  # of a run within the tests' process
    for rank in ({}, {"RANK": "0"}):
        assert not list(tmp_path.iterdir())
        subprocess.run([sys.executable, "-c", BUSY, "vl3train.train"], env=env | rank, check=True, timeout=60)
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("rank-0-")
    found = json.loads(file.read_text())
    started = Started(seconds=1.0, phases=found.pop("kinds"), **found, lines=[])
    assert started.phase_seconds("start: data") > 0.2
    assert "| start: data |" in "\n".join(timeline(started))
    assert ":waits" in "\n".join(common_places(started))


def test_a_stack_is_counted_by_its_innermost_known_frame():
    kind_of = runpy.run_path(str(WATCH / "sitecustomize.py"))["kind_of"]
    check, ours = "x/model/attention/check.py", "x/vl3train/engine/step.py"
    for files, kind in (
        (["<frozen importlib._bootstrap>", check, ours], "imports"),
        (["x/flash_attn/cute/interface.py", check, ours], "flash-attn-4"),
        (["x/torch/_tensor.py", check, ours], "check of kernels"),
        (["x/torch/_tensor.py", ours], "other of vl3train"),
        (["x/selectors.py"], "other"),
    ):
        assert kind_of(files) == kind, files
