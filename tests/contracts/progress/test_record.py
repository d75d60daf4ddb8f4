"""A record says what its process did last, also after it was killed; writing it costs a step nothing."""

from __future__ import annotations

import os
import signal
import time

from tests.contracts.full_disk import files_of_at_most
from vl3train.contracts.progress.job import read_records
from vl3train.contracts.progress.record import GONE, STOPPED_BY_SIGNAL, Progress


def child_with_record(path):
    """A process that has written a record, and waits."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        mine = Progress()
        mine.keep_in(path)
        mine.phase("forward", step=7, micro_batch=2)
        mine.packs(["a/0/cat", "a/0/dog"])
        mine.sample("a/0/cat", "reading")
        mine.place("a/0.tar, bytes 512 to 1024")
        os.write(told, b"x")
        signal.pause()
    os.read(ready, 1)
    return pid


def test_a_killed_rank_has_left_where_it_was(tmp_path):
    pid = child_with_record(tmp_path / "rank-3")
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)
    (seen,) = read_records(tmp_path)
    assert seen.state == STOPPED_BY_SIGNAL
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    (seen,) = read_records(tmp_path)
    assert (seen.rank, seen.process, seen.state, seen.is_worker) == (3, pid, GONE, False)
    assert seen.where() == "forward of micro-batch 2, step 7"
    assert (seen.packs, seen.sample, seen.place) == (
        "a/0/cat, a/0/dog",
        "reading a/0/cat",
        "a/0.tar, bytes 512 to 1024",
    )


def test_a_worker_that_has_ended_is_no_longer_told(tmp_path):
    pid = child_with_record(tmp_path / "rank-0.worker-1-99")
    (seen,) = read_records(tmp_path)
    assert seen.is_worker
    assert seen.rank == 0
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert read_records(tmp_path) == []


def test_where_the_disk_has_no_room_for_it_the_process_goes_on(tmp_path, capsys):
    """A write into mapped memory would end it by SIGBUS."""
    mine = Progress()
    with files_of_at_most(0):
        mine.keep_in(tmp_path / "rank-0")
    mine.phase("forward", step=7)
    assert mine.seen().where() == "forward, step 7"
    assert mine.path is None
    assert not list(tmp_path.iterdir())
    assert "rank-0 cannot be written: File too large" in capsys.readouterr().err


def test_long_texts_are_cut_and_a_shorter_one_leaves_nothing_of_the_longer():
    mine = Progress()
    mine.packs(["ä" * 50] * 1000)
    assert 8000 < len(mine.seen().packs.encode()) <= 8300
    mine.packs(["b"])
    assert mine.seen().packs == "b"


def test_a_change_of_phase_takes_microseconds(tmp_path):
    mine = Progress()
    mine.keep_in(tmp_path / "rank-0")
    best = float("inf")
    for _ in range(20):
        begin = time.perf_counter()
        for number in range(100):
            mine.phase("forward", micro_batch=number)
        best = min(best, (time.perf_counter() - begin) / 100)
    assert best < 20e-6
    assert mine.seen().seconds < 60
