"""metrics.jsonl must survive any end of a process; what is printed must suit where it goes."""

from __future__ import annotations

import doctest
import io
import json
import os
import pty
import subprocess
import sys

import vl3train.engine.monitor.console as module
from vl3train.engine.monitor.console import Console, figures_text

SCRIPT = """
import os, sys
from vl3train.engine.monitor.console import Console
console = Console(sys.argv[1], stage_name="stage 2", enabled=True)
console.message("starts [not markup]")
console.start(first_step=2, total_steps=6)
for step in range(3, 7):
    figures = {"loss": 1.0, "tokens_per_second": 15300.0, "memory_gib": None}
    console.metrics({"step": step, "part_grad_norms": {}, **figures})
if sys.argv[2] == "killed":
    os.kill(os.getpid(), 9)
console.close()
"""


def figures(step, **more):
    return {
        "step": step,
        "part_grad_norms": {"projector": 0.5},
        "epoch": 0,
        "loss": 1.5,
        "learning_rates": {"projector": 1e-3},
        "fill": 0.9,
        **more,
    }


def console_of(folder, out, *, enabled=True, first=0, total):
    folder.mkdir(exist_ok=True)
    console = Console(folder, stage_name="stage 2", enabled=enabled, out=out)
    console.start(first_step=first, total_steps=total)
    return console


def test_examples():
    assert doctest.testmod(module).failed == 0


def test_every_call_writes_one_json_line_and_lines_are_thinned(tmp_path):
    out = io.StringIO()
    console = console_of(tmp_path / "run", out, total=50)
    rows = [figures(step, source_losses={"captions": 0.5}) for step in range(1, 51)]
    for row in rows:
        console.metrics(row)
    console.close()
    written = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == rows
    lines = out.getvalue().splitlines()
    assert len(lines) == 2  # the first and the last; all of it took less than five seconds
    assert "step 1/50" in lines[0]
    assert "step 50/50" in lines[1]
    assert "loss 1.5000" in lines[1]
    assert "lr 1.0e-03" in lines[1]
    assert "\x1b" not in out.getvalue()


def test_a_rank_other_than_the_first_is_silent(tmp_path):
    out = io.StringIO()
    console = console_of(tmp_path / "run", out, enabled=False, total=5)
    console.metrics(figures(1))
    console.message("hello")
    console.table("t", [{"source": "a"}])
    console.close()
    assert out.getvalue() == ""
    assert list((tmp_path / "run").iterdir()) == []


def test_the_index_pass_is_told(tmp_path):
    out = io.StringIO()
    console = Console(tmp_path, stage_name="stage 2", enabled=True, out=out)
    for done in range(1, 301):
        console.progress("captions", done, 300)
    lines = out.getvalue().splitlines()
    assert lines == ["index of captions  1/300 samples", "index of captions  300/300 samples"]


def test_a_table_shows_every_cell(tmp_path):
    out = io.StringIO()
    console = console_of(tmp_path, out, total=5)
    console.table("held-out", [{"source": "count", "accuracy": "70%"}, {"source": "read", "accuracy": "40%"}])
    for text in ("held-out", "source", "accuracy", "count", "70%", "read", "40%"):
        assert text in out.getvalue()


def test_a_killed_process_loses_no_line(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), "killed"], capture_output=True, text=True
    )
    assert ended.returncode == -9
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [3, 4, 5, 6]
    assert "starts [not markup]" in ended.stdout


def test_a_terminal_gets_a_bar(tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path), "ends"],
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "160"},
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(ours)
    assert process.wait() == 0
    text = shown.decode()
    assert "6/6" in text
    assert "15.3k tok/s" in text
    assert "━" in text
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_seconds_of_compilation_stand_in_the_line_only_where_something_was_compiled():
    assert "compiled 40.1 s" in figures_text(figures(0, compile_seconds=40.12))
    assert figures_text(figures(1, compile_seconds=0.0)) == figures_text(figures(1))
