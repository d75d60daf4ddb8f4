"""Lines that the disk does not take wait, and none is written twice or by half. What is printed may be lost."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys

import pytest

from vl3train.contracts.line_log import LineLog


def test_lines_wait_while_the_disk_is_full_and_come_whole(tmp_path):
    """The process may write 25 bytes of a file: what a full disk does, in the middle of a line."""
    path, said = tmp_path / "log.jsonl", []
    log = LineLog(path, said.append)
    log.append(["first line"])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (25, before[1]))
    try:
        log.append(["second line, which does not fit"])
        log.append(["third"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert len(said) == 1
    assert "cannot be written" in said[0]
    log.append(["fourth"])
    assert path.read_text().splitlines() == [
        "first line",
        "second line, which does not fit",
        "third",
        "fourth",
    ]
    assert "3 lines" in said[1]


def test_a_log_that_can_never_be_written_says_so_and_how_much_is_lost(tmp_path):
    (tmp_path / "file").write_text("")
    said = []
    log = LineLog(tmp_path / "file" / "log.jsonl", said.append)
    log.append(["a"])
    log.append(["b"])
    log.close()
    assert len(said) == 2
    assert "last 2 lines" in said[1]


def test_lines_that_somebody_takes_away_are_told_once(tmp_path):
    path, said = tmp_path / "log.jsonl", []
    log = LineLog(path, said.append)
    log.append(["first"])
    path.unlink()
    log.append(["second"])
    log.append(["third"])
    assert path.read_text() == "second\nthird\n"
    assert len(said) == 1
    assert "was removed or cut: it had 6 bytes, and has 0." in said[0]
    path.write_text("third\n")
    log.was_cut()  # by the run itself
    log.append(["fourth"])
    assert len(said) == 1


PRINTS = """
import sys
from vl3train.contracts.line_log import let_output_fail
let_output_fail()
for _ in range(3):
    print("figures", flush=True)
    print("to be read", file=sys.stderr)
"""


@pytest.mark.parametrize("what", ["full disk", "reader that has gone"])
def test_output_that_cannot_be_written_is_told_once_by_the_other_stream(what):
    if what == "full disk":
        out, why = os.open("/dev/full", os.O_WRONLY), "No space left on device"
    else:
        reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
        reader.wait()
        out, why = reader.stdin, "Broken pipe"
    done = subprocess.run([sys.executable, "-c", PRINTS], stdout=out, stderr=subprocess.PIPE, text=True)
    told = f"standard output cannot be written: {why}. The run goes on; that text is lost"
    assert done.stderr.split("\n") == ["", told, *3 * ["to be read"], ""], done.stderr


def test_where_neither_can_be_written_the_process_goes_on(tmp_path):
    ends = PRINTS + f"open({str(tmp_path / 'there')!r}, 'w').close()"
    with open("/dev/full", "w") as full:
        subprocess.run([sys.executable, "-c", ends], stdout=full, stderr=full)
    assert (tmp_path / "there").exists()
