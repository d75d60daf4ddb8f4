"""Whatever is raised, on whichever rank: every process of the job ends, and the cause stands at the end."""

from __future__ import annotations

import doctest
import json
import os
import pty
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from tests.contracts.full_disk import files_of_at_most
from tests.engine.ends import ENDS, RESUMED, RUN, problem_of_end
from tests.engine.jobs import ROOT
from tests.engine.planted import PLANTED_AT
from tests.engine.runs import EARLIER, EARLIER_WORDS, run
from tests.engine.small_demo import small_demo_words
from vl3train.engine import failure
from vl3train.engine.failure import ERROR_FILE, FAILED, INTERRUPTED, report_failure
from vl3train.engine.ranks import OneRankError, Rank, RunError


def test_doctests():
    assert doctest.testmod(failure).failed == 0


@pytest.fixture(scope="module")
def stage1_words(demo_root, tmp_path_factory):
    """Options of a run of two ranks with loader workers, and a folder of it with a checkpoint."""
    out = tmp_path_factory.mktemp("before")
    run([*small_demo_words(demo_root), *RUN, f"run.output_dir={out}"])
    (out / "finished.json").unlink()
    return [*small_demo_words(demo_root, num_workers=1), *RUN], out


@pytest.mark.two_processes
def test_whatever_is_raised_all_processes_end_and_the_cause_is_the_last_thing_said(
    warm_python, stage1_words, tmp_path
):
    """One test for all of them: the jobs wait for one another a lot, so that some run side by side.

    Every fifth is started by torchrun itself.
    """
    words, before = stage1_words

    def problem(number_and_end):
        number, end = number_and_end
        folder = tmp_path / str(number)
        if end in RESUMED:
            shutil.copytree(before, folder / "run")
        launcher = "vl3train.launch" if number % 5 else "torch.distributed.run"
        return problem_of_end(warm_python, end, words, folder, launcher)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(problem, enumerate([*ENDS, *RESUMED])))
    assert not any(found), "\n\n".join(filter(None, found))


def test_too_many_failed_samples_end_one_rank_with_a_message(tmp_path, monkeypatch, capsys):
    """The pictures change after they are indexed, and keep their size and time."""
    shutil.copytree(EARLIER, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    run([*EARLIER_WORDS, "run.output_dir=first", "run.num_steps=1"])
    shard = tmp_path / "copy/data/shape/shard-000000.tar"
    before = shard.stat()
    shard.write_bytes(shard.read_bytes().replace(b"\xff\xd8\xff", b"\xff\xd8\xfe"))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(OneRankError, match=r"^rank 0: step \d: 1 samples failed one after") as caught:
        run([*EARLIER_WORDS, "run.output_dir=new", "data.max_consecutive_failed=1"])
    assert "new/ledger.rank0.jsonl" in str(caught.value)
    capsys.readouterr()
    report_failure(caught.value, Rank(index=1, dp_size=2, device=None))
    assert capsys.readouterr().err == f"\n{caught.value}\n", (
        "printed by the rank that saw it, without traceback"
    )


def test_the_cause_is_said_where_the_folder_for_temporary_files_is_full(tmp_path, monkeypatch, capsys):
    """torchrun wants it in a file there."""
    file = tmp_path / "error.json"
    monkeypatch.setenv(ERROR_FILE, str(file))
    with files_of_at_most(0):
        assert report_failure(IndexError("planted here"), None) == FAILED
    assert "the run ends with IndexError: planted here" in capsys.readouterr().err
    assert not file.exists()
    report_failure(IndexError("planted here"), None)
    assert "planted here" in file.read_text()


def test_a_start_that_fails_after_the_bar_began_ends_it_before_the_cause(warm_python, tmp_path):
    shutil.copytree(EARLIER, tmp_path / "copy")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [
            *warm_python,
            "-m",
            "tests.engine.planted",
            "error@tracker",
            "0",
            *EARLIER_WORDS,
            "run.output_dir=new",
        ],
        cwd=tmp_path / "copy",
        env={
            **os.environ,
            **{"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "160"},
            **{PLANTED_AT: str(tmp_path / "planted")},
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


def test_what_is_left_for_torchrun_appears_whole(tmp_path, monkeypatch, capsys):
    """It reads the files of ranks that it has just ended: half a file would end it with a traceback."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (seen.append(file.exists()), replace(*names)))
    report_failure(ValueError("why"), None)
    assert seen == [False], "nothing stands there until it is whole"
    assert "ValueError: why" in json.loads(file.read_text())["message"]["message"]
    assert [one.name for one in tmp_path.iterdir()] == ["error.json"]
    assert "why" in capsys.readouterr().err


def test_torchruns_table_shows_a_message_for_the_user_without_traceback(tmp_path, monkeypatch, capsys):
    shown = {}
    for error in (RunError("disk full; make room"), OneRankError("make room here"), IndexError("our own")):
        file = tmp_path / f"{type(error).__name__}.json"
        monkeypatch.setenv(ERROR_FILE, str(file))
        try:
            raise error
        except Exception as caught:
            report_failure(caught, None)
        ended = ProcessFailure(local_rank=0, pid=7, exitcode=FAILED, error_file=str(file))
        shown[type(error)] = str(ChildFailedError("train", {0: ended}))
    assert "traceback : disk full; make room\n" in shown[RunError]
    assert "make room here" in shown[OneRankError]
    assert [("Traceback" in text) for text in shown.values()] == [False, False, True]
    assert "IndexError: our own" in shown[IndexError]
