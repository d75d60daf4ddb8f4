"""The command names each damaged file, by its exit code too, and needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.engine.checkpoints.made import make
from vl3train.cli.main import main
from vl3train.model.weights.headers.manifest import write_manifest


def test_whole_and_damaged_checkpoints_are_told(tmp_path, capsys):
    run = tmp_path / "run"
    whole, damaged = make(run / "checkpoints", 1), make(run / "checkpoints", 2)
    assert main(["verify-checkpoint", str(run)]) == 0
    assert capsys.readouterr().out.count("whole, 2 files") == 2
    (damaged / "engine" / "weights.bin").write_bytes(b"x" * 99 + b"z")
    (damaged / "resume.json").unlink()
    assert main(["verify-checkpoint", str(run)]) == 1
    said = capsys.readouterr().out
    assert f"{whole}: whole" in said
    assert f"{damaged}: damaged" in said
    assert "engine/weights.bin is not what was written" in said
    assert "resume.json is missing (" in said
    assert main(["verify-checkpoint", str(whole)]) == 0


def test_the_weights_that_adapters_are_on_are_read_too(tmp_path, capsys):
    checkpoint = make(tmp_path / "checkpoints", 1)
    base = make(tmp_path / "made", 2).rename(tmp_path / "base")
    assert main(["verify-checkpoint", str(tmp_path)]) == 0
    assert str(base) not in capsys.readouterr().out, "there are no adapters: it is somebody's own folder"
    (checkpoint / "adapter").mkdir()
    assert main(["verify-checkpoint", str(tmp_path)]) == 0
    assert f"{base}: whole" in capsys.readouterr().out
    (base / "engine" / "weights.bin").write_bytes(b"x" * 99 + b"z")
    assert main(["verify-checkpoint", str(tmp_path)]) == 1
    assert f"{base}: damaged" in capsys.readouterr().out
    (base / "MANIFEST.json").unlink()
    assert main(["verify-checkpoint", str(tmp_path)]) == 0, (
        "an earlier build wrote no manifest and no digest of one"
    )
    assert "nobody can say whether these weights" in capsys.readouterr().out
    (checkpoint / "resume.json").write_text(json.dumps({"base": "0123"}))
    write_manifest(checkpoint)
    assert main(["verify-checkpoint", str(tmp_path)]) == 1
    assert f"{base}: damaged: it has no MANIFEST.json, and had one when" in capsys.readouterr().out


def test_a_folder_without_checkpoints_is_an_error(tmp_path, capsys):
    assert main(["verify-checkpoint", str(tmp_path)]) == 1
    assert "holds no checkpoint" in capsys.readouterr().err


def test_it_does_not_wait_for_torch():
    code = "import sys, vl3train.cli.verify_checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
