"""A row of the GPU benchmark cannot take the others down, however it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.gpu import process as gpu_process
from benchmarks.gpu.process import in_own_processes
from benchmarks.gpu.rows import ROWS, WAYS, Row, quick, tiny
from tests.long import first_of


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


@pytest.mark.long
def test_rank_0_speaks_for_the_row():
    found = in_own_processes(answers, "some", Row(ranks=2), True)
    assert found == {"name": "some", "rank": "0", "of": "2"}


@pytest.mark.parametrize(
    ("child", "reason"),
    first_of(
        (dies, "the process of rank 0 died"),
        (one_fails, "out of memory"),
        (never_answers, "not done within 3 s"),
    ),
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
    if rank == 0:
        Path(name).write_text(str(os.getpid()))
        pipe.send({"so_far": {"tflops": 2.0, "rank": rank}})  # wakes whoever looks at the clock
    time.sleep(60)


@pytest.mark.long
def test_what_was_measured_before_the_time_was_over_is_not_lost(tmp_path, monkeypatch):
    note = tmp_path / "pid"
    # Over as soon as all is told, however long the processes take to start.
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 3600 * note.exists())
    monkeypatch.setattr(gpu_process, "time", clock)
    found = in_own_processes(tells_and_sleeps, str(note), Row(ranks=2, max_seconds=300), True)
    assert found == {"tflops": 2.0, "rank": 0, "ended_early": "not done within 300 s"}


def test_every_row_names_a_way_and_can_be_made_small():
    for row in ROWS.values():
        assert row.way in WAYS
        assert tiny(row).model == "tiny"
        assert quick(row).steps == 1
    names = [name for row in ROWS.values() for name in row.figures.values()]
    assert len(names) == len(set(names))


def test_figures_are_kept_before_a_process_that_takes_its_time_has_ended(tmp_path):
    """As one that gives back much memory: whoever ends the command may not wait for it."""
    alive = []

    def keep(found):
        alive.append((found, os.path.exists(f"/proc/{(tmp_path / 'pid').read_text()}")))

    found = in_own_processes(answers_late, str(tmp_path / "pid"), Row(max_seconds=60), True, keep)
    assert alive == [(found, True)] == [({"tflops": 3.0}, True)]


def answers_late(name, row, rank, tiny, pipe):
    Path(name).write_text(str(os.getpid()))
    pipe.send({"tflops": 3.0})
    time.sleep(60)


def sleeps(name, row, rank, tiny, pipe):
    Path(name).write_text(str(os.getpid()))
    time.sleep(60)


def answers_and_sleeps(name, row, rank, tiny, pipe):
    pipe.send({"tflops": 3.0})
    sleeps(name, row, rank, tiny, pipe)  # as one that gives back much memory


@pytest.mark.parametrize("child", first_of("tells_and_sleeps", "sleeps", "answers_and_sleeps"))
def test_a_command_that_is_ended_ends_its_processes(tmp_path, child):
    note = tmp_path / "pid"
    code = (
        "from benchmarks.gpu.process import in_own_processes; from benchmarks.gpu.rows import Row;"
        f"from tests.benchmarks.test_processes import {child};"
        "kept = [];"
        f"found = in_own_processes({child}, {str(note)!r}, Row(), True, kept.append);"
        "import sys; sys.exit(f'{found}, kept {kept}')"
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
        kept = {"sleeps": b"", "tells_and_sleeps": b"'tflops': 2.0", "answers_and_sleeps": b"'tflops': 3.0"}[
            child
        ]
        assert kept in said.partition(b"kept ")[2]
    finally:
        command.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)
