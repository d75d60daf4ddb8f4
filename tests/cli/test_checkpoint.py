"""The list says what each checkpoint is; old ones go by the run's own rules, and none while a run may need it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.engine.checkpoints.made import make
from vl3train.cli.main import main
from vl3train.engine.best import BEST_FILE
from vl3train.engine.start.lock import lock
from vl3train.model.weights.headers.manifest import MANIFEST, list_files

MACHINE = {"machine.dp_size": 4, "machine.zero_stage": 3, "machine.dtype": "bfloat16"}


@pytest.fixture
def run_folder(tmp_path):
    for step in (10, 20, 30, 40):
        make(
            tmp_path / "checkpoints",
            step,
            identity={"machine": MACHINE},
            config={"run": {"keep_every_steps": 20}},
        )
    return tmp_path


def steps_of(folder):
    return [int(path.name.removeprefix("step_")) for path in sorted((folder / "checkpoints").glob("step_*"))]


def rows(text):
    return [line.split() for line in text.splitlines() if line.strip()[:1].isdigit()]


def test_each_has_a_row(run_folder, capsys):
    (run_folder / "checkpoints/step_00000020/adapter").mkdir()
    make(run_folder / "checkpoints", 50).rename(run_folder / "checkpoints/step_old_copy")
    make(run_folder / "made", 1).rename(run_folder / "base")  # of a run with adapters; it is no checkpoint
    assert main(["checkpoint", str(run_folder)]) == 0
    found = rows(capsys.readouterr().out)
    assert found[0] == ["10", "0.00", "sizes", "are", "right", "4", "3", "bfloat16", "nothing"]
    assert found[1][-1] == "adapter"
    assert main(["checkpoint", str(run_folder), "--read"]) == 0
    assert [row[2] for row in rows(capsys.readouterr().out)] == ["whole"] * 4
    assert main(["checkpoint", str(run_folder / "checkpoints/step_old_copy")]) == 1
    assert "step_old_copy: a run calls its checkpoints step_00000010" in capsys.readouterr().err


def test_damage_that_only_reading_finds_is_found_by_reading(run_folder, capsys):
    folder = run_folder / "checkpoints/step_00000030"
    (folder / "engine" / "weights.bin").write_bytes(b"x" * 99 + b"z")
    assert main(["checkpoint", str(run_folder)]) == 0
    assert main(["checkpoint", str(run_folder), "--read"]) == 1
    said = capsys.readouterr().out
    assert f"{folder}: engine/weights.bin is not what was written" in said
    (folder / "resume.json").write_text("{")
    assert main(["checkpoint", str(folder)]) == 1
    assert rows(capsys.readouterr().out) == [["30", "0.00", "damaged", "?", "?", "?", "nothing"]]


def test_old_ones_are_deleted_and_the_best_and_regular_ones_stay(run_folder, capsys):
    (run_folder / BEST_FILE).write_text(json.dumps({"checkpoint": "checkpoints/step_00000010", "step": 10}))
    assert main(["checkpoint", str(run_folder), "--keep", "1"]) == 0
    assert steps_of(run_folder) == [10, 20, 40]
    said = capsys.readouterr().out
    assert f"deleted {run_folder / 'checkpoints/step_00000030'}" in said
    assert [row[0] for row in rows(said)] == ["10", "20", "40"]


def test_the_newest_that_is_not_damaged_stays(run_folder):
    (run_folder / "checkpoints/step_00000040/MANIFEST.json").unlink()
    assert main(["checkpoint", str(run_folder), "--keep", "1"]) == 1
    assert steps_of(run_folder) == [20, 30, 40]


def test_a_newest_with_a_flipped_byte_does_not_cost_the_ones_before(run_folder, capsys):
    newest = run_folder / "checkpoints/step_00000040"
    (newest / "engine/weights.bin").write_bytes(b"x" * 99 + b"z")
    text = run_folder / "checkpoints/step_00000050"
    text.write_text("a file with a checkpoint's name")
    assert main(["checkpoint", str(run_folder), "--keep", "1"]) == 1
    assert steps_of(run_folder) == [20, 30, 40, 50]
    said = capsys.readouterr().out
    assert f"{newest}: engine/weights.bin is not what was written" in said
    assert f"deleted {text}" not in said, "it is still there"


def test_a_newest_without_digests_whose_options_are_lost_deletes_nothing(run_folder, capsys):
    newest = run_folder / "checkpoints/step_00000040"
    (newest / "resume.json").write_text("[]")
    (newest / MANIFEST).write_text(json.dumps(list_files(newest)))  # as before 2026-12
    assert main(["checkpoint", str(run_folder), "--keep", "1"]) == 1
    assert "resume.json cannot be read" in capsys.readouterr().err
    assert steps_of(run_folder) == [10, 20, 30, 40]


def test_an_address_is_not_taken_for_a_folder(capsys):
    assert main(["checkpoint", "s3://me:swordfish@bucket/runs/mine"]) == 1
    said = capsys.readouterr().err
    assert "s3://bucket/runs/mine is elsewhere: bring its newest checkpoint with --fetch DIR" in said


def test_nothing_is_deleted_where_it_should_not(run_folder, capsys):
    for words, message in (
        ([str(run_folder), "--keep", "0"], "the newest stays at least"),
        ([str(run_folder / "checkpoints"), "--keep", "1"], "is no output folder of a run"),
        ([str(run_folder / "checkpoints/step_00000040"), "--keep", "1"], "is no output folder of a run"),
    ):
        assert main(["checkpoint", *words]) == 1
        assert message in capsys.readouterr().err
    handle = lock(run_folder)
    assert main(["checkpoint", str(run_folder), "--keep", "1"]) == 1
    assert "is in use by another run: process" in capsys.readouterr().err
    os.close(handle)
    for folder in (run_folder / "checkpoints").iterdir():
        (folder / "MANIFEST.json").unlink()
    assert main(["checkpoint", str(run_folder), "--keep", "1"]) == 1
    assert steps_of(run_folder) == [10, 20, 30, 40]


def test_the_list_does_not_wait_for_torch():
    code = "import sys, vl3train.cli.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
