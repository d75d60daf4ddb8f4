"""Whatever is raised, on whichever rank: every process of the job ends, and the cause stands at the end."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import time

import pytest

from tests.engine.jobs import ROOT, processes_of, start_job
from tests.engine.runs import EARLIER, EARLIER_WORDS, run
from vl3train.engine.failure import FAILED, INTERRUPTED, report_failure
from vl3train.engine.ranks import OneRankError, Rank, RunError

SECONDS = 60
"""In which all processes of a job are gone after one of them failed."""


@pytest.fixture(scope="module")
def stage1_words(demo_words, tmp_path_factory):
    """Options of a run of two ranks with loader workers, which would take a while."""
    out = tmp_path_factory.mktemp("indexed")
    run([*demo_words, "stage=1", f"run.output_dir={out}", "run.num_steps=1", "run.evaluate_at_end=false"])
    return [*demo_words, "stage=1", "data.num_workers=1", "run.num_steps=500", "run.evaluate_steps=4"]


def start(python, kind, rank, words, out, log):
    return start_job(
        python,
        "tests.engine.planted",
        [kind, rank, *words, f"run.output_dir={out}"],
        stdout=log,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.two_processes
@pytest.mark.parametrize(
    ("kind", "rank", "cause"),
    [
        ("step", "1", "IndexError: planted here"),
        ("worker", "0", "IndexError: planted here"),
        ("interrupt", "1", "KeyboardInterrupt"),
        ("exit", "1", "SystemExit: 0"),
        ("kill", "1", "Signal 9 (SIGKILL)"),
    ],
)
def test_a_job_of_two_ranks_ends_with_the_cause(warm_python, stage1_words, tmp_path, kind, rank, cause):
    with (tmp_path / "log").open("w") as log:
        process, job = start(warm_python, kind, rank, stage1_words, tmp_path / "out", log)
        code = process.wait(timeout=240)
    deadline = time.monotonic() + SECONDS
    while left := processes_of(job):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    log = (tmp_path / "log").read_text()
    assert code != 0, log
    # torchrun closes with a table of what failed first; the cause stands in it
    assert cause in log[log.rindex("Root Cause") :], log


def test_too_many_failed_samples_end_one_rank_with_a_message(tmp_path, monkeypatch, capsys):
    """Two of the six pictures are cut off; the first step has one of them."""
    shutil.copytree(EARLIER, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    with pytest.raises(OneRankError, match=r"^rank 0: step 0: 1 samples failed one after") as caught:
        run([*EARLIER_WORDS, "run.output_dir=new", "data.max_consecutive_failed=1"])
    assert "new/ledger.rank0.jsonl" in str(caught.value)
    capsys.readouterr()
    report_failure(caught.value, Rank(index=1, dp_size=2, device=None))
    assert capsys.readouterr().err == f"\n{caught.value}\n", (
        "printed by the rank that saw it, without traceback"
    )


def test_a_start_that_fails_after_the_bar_began_ends_it_before_the_cause(warm_python, tmp_path):
    shutil.copytree(EARLIER, tmp_path / "copy")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*warm_python, "-m", "tests.engine.planted", "tracker", "0", *EARLIER_WORDS, "run.output_dir=new"],
        cwd=tmp_path / "copy",
        env={
            **os.environ,
            **{"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "160"},
            **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"},
        },
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while chunk := read_terminal(ours):
        shown += chunk
    os.close(ours)
    assert process.wait() == FAILED
    text = shown.decode()
    cursor_hidden, cursor_back = text.rindex("\x1b[?25l"), text.rindex("\x1b[?25h")
    assert cursor_hidden < cursor_back < text.index("Traceback")
    assert text.rstrip().endswith("rank 0 of 1: the run ends with IndexError: planted here")


def read_terminal(terminal):
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux says so when the other end is closed
        return b""


def test_each_kind_of_error_has_its_message(capsys):
    second = Rank(index=1, dp_size=2, device=None)
    assert report_failure(RunError("on all"), second) == FAILED
    assert capsys.readouterr().err == "", "the first rank prints it"
    assert report_failure(OneRankError("here alone"), second) == FAILED
    assert capsys.readouterr().err == "\nhere alone\n"
    assert report_failure(KeyboardInterrupt(), second) == INTERRUPTED
    assert "rank 1 of 2: interrupted (SIGINT)" in capsys.readouterr().err
    assert report_failure(ValueError("why"), None) == FAILED
    assert capsys.readouterr().err.endswith(
        "\nbefore it joined the other ranks: the run ends with ValueError: why\n"
    )
