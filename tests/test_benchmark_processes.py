"""A row of the GPU benchmark cannot take the others down, however it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_process import in_own_processes
from benchmarks.gpu_rows import ROWS, WAYS, Row, quick, tiny


def answers(name, row, rank, tiny, pipe):
    pipe.send({"name": name, "rank": os.environ["RANK"], "of": os.environ["WORLD_SIZE"]})


def one_fails(name, row, rank, tiny, pipe):
    if rank == 1:
        pipe.send({"failed": "out of memory"})
    time.sleep(60)  # as a rank that waits for the other in a collective


def dies(name, row, rank, tiny, pipe):
    os._exit(3)


def never_answers(name, row, rank, tiny, pipe):
    time.sleep(60)


def test_rank_0_speaks_for_the_row():
    found = in_own_processes(answers, "some", Row(ranks=2), True)
    assert found == {"name": "some", "rank": "0", "of": "2"}


@pytest.mark.parametrize(
    ("child", "reason"),
    [
        (one_fails, "out of memory"),
        (dies, "the process of rank 0 died"),
        (never_answers, "not done within 3 s"),
    ],
)
def test_what_goes_wrong_is_told_and_ended_at_once(child, reason):
    started = time.monotonic()
    row = Row(ranks=2 if child is one_fails else 1, max_seconds=3 if child is never_answers else 60)
    found = in_own_processes(child, "some", row, True)
    assert found == {"failed": reason}
    assert time.monotonic() - started < 30


def tells_and_sleeps(name, row, rank, tiny, pipe):
    pipe.send({"so_far": {"tflops": 1.0, "rank": rank}})
    pipe.send({"so_far": {"tflops": 2.0, "rank": rank}})
    Path(name).write_text(str(os.getpid()))
    time.sleep(60)


def test_what_was_measured_before_the_time_was_over_is_not_lost(tmp_path):
    found = in_own_processes(tells_and_sleeps, str(tmp_path / "pid"), Row(ranks=2, max_seconds=8), True)
    assert found == {"tflops": 2.0, "rank": 0, "ended_early": "not done within 8 s"}


def test_every_row_names_a_way_and_can_be_made_small():
    for row in ROWS.values():
        assert row.way in WAYS
        assert tiny(row).model == "tiny"
        assert quick(row).steps == 1
    names = [name for row in ROWS.values() for name in row.figures.values()]
    assert len(names) == len(set(names))


def sleeps(name, row, rank, tiny, pipe):
    Path(name).write_text(str(os.getpid()))
    time.sleep(60)


def answers_and_sleeps(name, row, rank, tiny, pipe):
    pipe.send({"tflops": 3.0})
    sleeps(name, row, rank, tiny, pipe)  # as one that gives back much memory


@pytest.mark.parametrize("child", ["sleeps", "tells_and_sleeps", "answers_and_sleeps"])
def test_a_command_that_is_ended_ends_its_processes(tmp_path, child):
    note = tmp_path / "pid"
    code = (
        "from benchmarks.gpu_process import in_own_processes; from benchmarks.gpu_rows import Row;"
        f"from tests.test_benchmark_processes import {child};"
        f"found = in_own_processes({child}, {str(note)!r}, Row(), True);"
        "import sys; sys.exit(str(found))"
    )
    command = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    try:
        while not (note.exists() and note.read_text()):
            assert command.poll() is None, command.communicate()[1]
            time.sleep(0.05)
        command.terminate()
        said = command.communicate(timeout=30)[1]
        assert b"ended by SIGTERM" in said
        assert (b"'tflops': 3.0" in said) == (child == "answers_and_sleeps"), "what is done is not lost"
    finally:
        command.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)
