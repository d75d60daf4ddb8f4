"""Lines that the disk does not take wait, and none is written twice or by half."""

from __future__ import annotations

import resource
import signal

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
