"""The front door: help without waiting, errors as one message, tracebacks where they are needed."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from types import ModuleType

import pytest

from vl3train.cli import main as front
from vl3train.cli.main import COMMANDS, main
from vl3train.engine.ranks import OneRankError, RunError


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"{name} " in shown
        assert command.about in shown
    assert main([]) == 2


def test_a_mistyped_command_is_corrected(capsys: pytest.CaptureFixture[str]):
    assert main(["exprot"]) == 2
    assert capsys.readouterr().err == "vl3train: no command exprot; did you mean export?\n"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    assert f"usage: vl3train {name}" in capsys.readouterr().out


def test_a_missing_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    def raises(args: Namespace) -> int:
        return len((tmp_path / "nothing").read_text())

    install(monkeypatch, raises)
    assert main(["trial"]) == 1
    assert capsys.readouterr().err.startswith("vl3train trial: [Errno 2]")
    monkeypatch.setenv("VL3TRAIN_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(["trial"])


def test_a_folder_that_the_system_refuses_is_one_line(tmp_path: Path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")

    def raises(args: Namespace) -> int:
        (tmp_path / "file" / "folder").mkdir(parents=True)
        return 0

    install(monkeypatch, raises)
    assert main(["trial"]) == 1
    assert capsys.readouterr().err.startswith("vl3train trial: [Errno 20] Not a directory:")


@pytest.mark.parametrize(
    "words",
    [
        "verify --samples 0",
        "inspect --samples -1",
        "calibrate --repeats 0",
        "plan --utilisation 0",
        "shards a.jsonl --samples-per-shard inf",
    ],
)
def test_numbers_that_mean_nothing_are_refused(words: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    assert words.split()[-2] in capsys.readouterr().err


def test_our_own_refusal_is_one_line_and_a_librarys_error_is_not(capsys, monkeypatch: pytest.MonkeyPatch):
    from vl3train.contracts.geometry import frame_indices

    def refuses(args: Namespace) -> int:
        return len(frame_indices(0, 25.0, fps=1, min_frames=1, max_frames=2))

    install(monkeypatch, refuses)
    assert main(["trial"]) == 1
    assert capsys.readouterr().err == "vl3train trial: a clip without frames\n"

    def fails(args: Namespace) -> int:
        return int("three")

    install(monkeypatch, fails)
    with pytest.raises(ValueError, match="three"):
        main(["trial"])


def test_what_stops_a_run_on_all_ranks_is_said_once_and_without_a_traceback(capsys, monkeypatch):
    def command(error: Exception):
        def refuses(args: Namespace) -> int:
            raise error

        return refuses

    install(monkeypatch, command(RunError("a shard is gone")))
    assert main(["trial"]) == 1
    assert capsys.readouterr().err == "vl3train trial: a shard is gone\n"
    monkeypatch.setenv("RANK", "1")
    assert main(["trial"]) == 1
    assert capsys.readouterr().err == "", "the first rank says it"
    install(monkeypatch, command(OneRankError("rank 1 found code")))
    assert main(["trial"]) == 1
    assert capsys.readouterr().err == "vl3train trial: rank 1 found code\n"
    install(monkeypatch, command(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["trial"])


def test_ctrl_c_stops_without_a_traceback(capsys, monkeypatch: pytest.MonkeyPatch):
    def is_stopped(args: Namespace) -> int:
        raise KeyboardInterrupt

    install(monkeypatch, is_stopped)
    assert main(["trial"]) == 130
    assert capsys.readouterr().err == "\nvl3train trial: stopped\n"


def install(monkeypatch: pytest.MonkeyPatch, command) -> None:
    """A command named ``trial`` that does what ``command`` does."""

    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("--nothing")

    module = ModuleType("vl3train_trial", "A trial.")
    module.add_arguments, module.main = add_arguments, command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vl3train_trial", module)
    monkeypatch.setitem(front.COMMANDS, "trial", front.Command("vl3train_trial", "try"))
