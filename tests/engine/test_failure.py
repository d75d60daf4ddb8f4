"""Whatever is raised, on whichever rank: every process of the job ends, and the cause stands at the end."""

from __future__ import annotations

import subprocess
import time

import pytest

from tests.engine.jobs import processes_of, start_job
from tests.engine.runs import run
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


def start(kind, rank, words, out, log):
    return start_job(
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
def test_a_job_of_two_ranks_ends_with_the_cause(stage1_words, tmp_path, kind, rank, cause):
    with (tmp_path / "log").open("w") as log:
        process, job = start(kind, rank, stage1_words, tmp_path / "out", log)
        code = process.wait(timeout=240)
    deadline = time.monotonic() + SECONDS
    while left := processes_of(job):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    told = (tmp_path / "log").read_text()
    assert code != 0, told
    # torchrun closes with a table of what failed first; the cause stands in it
    assert cause in told[told.rindex("Root Cause") :], told


def test_what_is_raised_is_told_by_its_kind(capsys):
    second = Rank(index=1, dp_size=2, device=None)
    assert report_failure(RunError("on all"), second) == FAILED
    assert capsys.readouterr().err == "", "the first rank tells it"
    assert report_failure(OneRankError("here alone"), second) == FAILED
    assert capsys.readouterr().err == "\nhere alone\n"
    assert report_failure(KeyboardInterrupt(), second) == INTERRUPTED
    assert "rank 1 of 2: interrupted (SIGINT)" in capsys.readouterr().err
    assert report_failure(ValueError("why"), None) == FAILED
    assert capsys.readouterr().err.endswith(
        "\nbefore it joined the others: the run ends with ValueError: why\n"
    )
