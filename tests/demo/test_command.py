"""``vl3train demo`` twice, and where it must not write."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

import pytest

from vl3train.demo import command
from vl3train.demo.questions import TASKS


def demo(*words: str) -> int:
    """Run the command as its command line would."""
    parser = ArgumentParser()
    command.add_arguments(parser)
    return command.main(parser.parse_args([*words, "--samples-scale", "0.01", "--no-parts"]))


def test_a_second_run_changes_nothing_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert demo(str(out)) == 0
    files = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}
    assert sum(file.suffix == ".tar" for file in files) == 2 * len(TASKS)
    capsys.readouterr()
    assert demo(str(out)) == 0
    assert "exist already" in capsys.readouterr().out.replace("\n", " ")
    assert files == {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=r"seed is 0 there and 1 here.*choose another folder"):
        demo(str(out), "--seed", "1")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a demo folder"):
        demo(str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_size_without_end_is_refused(tmp_path: Path) -> None:
    parser = ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(ValueError, match="must be a number above 0"):
        command.main(parser.parse_args([str(tmp_path / "demo"), "--samples-scale", "inf"]))
