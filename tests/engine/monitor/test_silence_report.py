"""The report names who is behind, and stays short where there are many ranks."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from vl3train.contracts.progress.record import RUNS, STOPPED_BY_SIGNAL, Seen
from vl3train.engine.monitor.silence_report import Answer, Report, python_stacks

FILE = Path("silence/report.txt")


def seen(rank, phase="optimizer", changes=5, *, worker=None, **more):
    name = f"rank-{rank}" if worker is None else f"rank-{rank}.worker-{worker}-99"
    fields = {
        "process": 100 + rank,
        "step": 7,
        "micro_batch": -1,
        "seconds": 301.0,
        "sample": "",
        "place": "",
    }
    return Seen(name=name, phase=phase, changes=changes, **{**fields, "packs": "", "state": RUNS, **more})


def answer(rank, *records, host="a"):
    return Answer(
        rank=rank, host=host, records=list(records), stacks={"MainThread": [f"a.py:{rank} in wait"]}
    )


def test_a_rank_that_waits_for_its_loader_is_behind_and_its_workers_sample_is_named():
    waiting = seen(1, "waiting for data", 2)
    place = "/data/0.tar, bytes 512 to 900"
    worker = seen(1, "loader worker", 1, worker=0, sample="reading a/0/cat", place=place)
    idle = seen(1, "loader worker", 1, worker=1, sample="nothing")
    report = Report(
        [
            answer(0, seen(0)),
            Answer.from_plain(json.loads(json.dumps(answer(1, waiting, worker, idle).as_plain()))),
        ],
        dp_size=2,
        silent_seconds=300.4,
    )
    text = report.short_text(FILE)
    assert "no progress for 300 s" in text
    assert "rank 1 (process 101 on a): waiting for data, step 7, for 301 s" in text
    assert (
        "worker 0 of rank 1 (process 101 on a): reading a/0/cat (/data/0.tar, bytes 512 to 900), for 301"
        in text
    )
    assert "worker 1" not in text
    assert "worker 1 of rank 1" in report.full_text()
    assert "behind: rank 1 (waiting for data, step 7)" in text
    assert "a.py:1 in wait" in text
    assert "a.py:0 in wait" not in text
    assert "a.py:0 in wait" in report.full_text()


def test_a_rank_that_cannot_answer_is_told_by_another_of_its_node():
    report = Report([answer(0, seen(0), seen(1, state=STOPPED_BY_SIGNAL))], dp_size=3, silent_seconds=300)
    text = report.short_text(FILE)
    assert "rank 1 (process 101 on a stopped by a signal, does not answer): optimizer, step 7" in text
    assert "behind: rank 1" in text
    assert "rank 2: no answer" in text


def test_of_a_thousand_ranks_one_is_shown():
    ranks = [answer(rank, seen(rank, *(("forward", 3) if rank == 600 else ()))) for rank in range(1000)]
    report = Report(ranks, dp_size=1000, silent_seconds=300)
    text = report.short_text(FILE)
    assert len(text.splitlines()) < 10
    assert "rank 600 (process 700 on a): forward, step 7" in text
    assert "999 other ranks: optimizer, step 7" in text


def test_while_one_rank_works_the_others_wait_as_they_should():
    report = Report([answer(0, seen(0)), answer(1, seen(1, seconds=3.0))], dp_size=2, silent_seconds=300)
    assert report.somebody_works(150)
    assert not report.somebody_works(2)


def test_stacks_are_those_of_the_other_threads():
    ends = threading.Event()
    thread = threading.Thread(target=ends.wait, name="waits")
    thread.start()
    stacks = python_stacks()
    ends.set()
    thread.join()
    assert any("in wait" in line for line in stacks["waits"])
    assert "MainThread" not in stacks, "the one that asks"
