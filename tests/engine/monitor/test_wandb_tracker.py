"""A real offline W&B run, read back from the file that W&B wrote."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from vl3train.config.choices import Tracker as TrackerKind
from vl3train.config.plain import as_plain
from vl3train.config.schema import TrackingConfig, TrainConfig
from vl3train.engine.monitor.wandb_tracker import Tracker, flat_figures

BLOCK_BYTES = 32768
LAST_OF_RECORD = (1, 4)  # a whole record, or the end of one that spans blocks


def records(path: Path) -> Iterator[object]:
    """The records of a .wandb file: a 7-byte header, then LevelDB's log format with protobuf inside."""
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    assert struct.unpack("<4sHB", content[:7])[:2] == (b":W&B", 0xBEE1)
    at, parts = 7, b""
    while at + 7 <= len(content):
        if (rest := BLOCK_BYTES - at % BLOCK_BYTES) < 7:
            at += rest
            continue
        checksum, length, kind = struct.unpack("<IHB", content[at : at + 7])
        if kind == 0:
            return
        part = content[at + 7 : at + 7 + length]
        assert zlib.crc32(bytes([kind]) + part) == checksum
        parts += part
        at += 7 + length
        if kind in LAST_OF_RECORD:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def read_run(path: Path) -> tuple[str, dict, list[dict], dict[str, str], int | None]:
    """Id, config, history, step axis of each metric, and exit code of a .wandb file."""
    run_id, config, history, axes, exit_code = "", {}, [], {}, None
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run_id = record.run.run_id
            config.update({item.key: json.loads(item.value_json) for item in record.run.config.update})
        elif kind == "history":
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            history.append({name: value for name, value in row.items() if not name.startswith("_")})
        elif kind == "metric":
            axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "exit":
            exit_code = record.exit.exit_code
    return run_id, config, history, axes, exit_code


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))


def tracking(**more) -> TrackingConfig:
    return TrackingConfig(kind=TrackerKind.wandb, **more)


def launch(folder: Path, first: int, last: int, exit_code: int) -> None:
    cfg = TrainConfig()
    cfg.stage.number, cfg.stage.name, cfg.stage.recipe = 3, "3_multitask_finetuning", "demo"
    cfg.stage.learning_rates = {"projector": 1e-5}
    cfg.run.output_dir = "run"
    tracker = Tracker(tracking(), folder, as_plain(cfg), step=first)
    for step in range(first, last):
        sources = {"captions": 1.0 / (step + 1), "clips": 2.0}
        tracker.log({"step": step, "loss": 3.0 - step, "source_losses": sources, "memory_gib": None}, step)
    tracker.finish(exit_code)


def test_an_offline_run_holds_config_history_and_source_losses_and_resumes_under_its_id(tmp_path, capsys):
    folder = tmp_path / "run"
    launch(folder, 0, 3, exit_code=1)
    first = set((folder / "wandb").glob("offline-run-*/*.wandb"))
    launch(folder, 2, 4, exit_code=0)
    (second,) = set((folder / "wandb").glob("offline-run-*/*.wandb")) - first

    run_id, config, history, axes, exit_code = read_run(next(iter(first)))
    assert run_id == (folder / "wandb_id.txt").read_text().strip()
    assert config["stage"]["name"] == "3_multitask_finetuning"
    assert config["optim"]["schedule"] == "cosine"
    assert history[1] == {
        "step": 1,
        "loss": 2.0,
        "source_losses/captions": 0.5,
        "source_losses/clips": 2.0,
    }
    assert [row["step"] for row in history] == [0, 1, 2]
    assert axes["*"] == "step"
    assert exit_code == 1

    again_id, _, again_history, again_axes, again_code = read_run(second)
    assert again_id == run_id
    assert [row["step"] for row in again_history] == [2, 3]
    assert again_axes["*"] == "step"
    assert again_code == 0

    printed = capsys.readouterr().out
    assert f"wandb sync {folder / 'wandb'}/offline-run-*-{run_id}" in printed
    assert f"{run_id} resumes at step 2" in printed


def test_no_key_and_no_address_of_a_repository_is_in_what_wandb_writes(tmp_path, monkeypatch):
    """W&B reads them all: the key to log in, the environment, the repository of the working folder."""
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "HF_HUB_TOKEN"):
        monkeypatch.setenv(name, f"s3cr3t{name.lower():x<40}"[:40])
    monkeypatch.setenv("WANDB_MODE", "offline")
    repository = tmp_path / "work"
    repository.mkdir()
    remote = "https://s3cr3t-token:x-oauth-basic@git.example/me/work.git"
    for words in (["init", "-q"], ["remote", "add", "origin", remote]):
        subprocess.run(["git", *words], cwd=repository, check=True)
    monkeypatch.chdir(repository)
    folder = tmp_path / "run"
    launch(folder, 0, 1, exit_code=0)
    written = [file for file in (folder / "wandb").rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in written)
    for file in written:
        assert b"s3cr3t" not in file.read_bytes(), file


def test_without_a_tracker_wandb_is_not_imported(tmp_path):
    script = (
        "import sys\n"
        "from vl3train.config.schema import TrackingConfig\n"
        "from vl3train.engine.monitor.wandb_tracker import Tracker\n"
        "tracker = Tracker(TrackingConfig(), sys.argv[1], {}, step=0)\n"
        "tracker.log({'loss': 1.0}, 0); tracker.finish(0)\n"
        "assert 'wandb' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], check=True)
    assert not (tmp_path / "run").exists()


def test_other_ranks_track_nothing(tmp_path):
    Tracker(tracking(), tmp_path / "run", {}, step=0, enabled=False).log({"loss": 1.0}, 0)
    assert not (tmp_path / "run").exists()


def test_nested_figures_are_flat_and_none_is_left_out():
    nested = {"held_out": {"count": {"accuracy": 0.5, "loss": None}}, "step": 3}
    assert flat_figures(nested) == {"held_out/count/accuracy": 0.5, "step": 3}
