"""A real offline W&B run, read back from the file that W&B wrote."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vl3train.config.choices import Tracker as TrackerKind
from vl3train.config.plain import as_plain
from vl3train.config.schema import TrackingConfig, TrainConfig
from vl3train.contracts.progress.record import GONE, process_state
from vl3train.engine.tracking import wandb_tracker
from vl3train.engine.tracking.tracker import ShownAnswer, flat_figures
from vl3train.engine.tracking.wandb_tracker import WandbTracker, _within
from vl3train.launch import children

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


def tracking(**more) -> TrackingConfig:
    return TrackingConfig(kind=TrackerKind.wandb, **more)


def launch(folder: Path, first: int, last: int, exit_code: int) -> None:
    cfg = TrainConfig()
    cfg.stage.number, cfg.stage.name, cfg.stage.recipe = 3, "3_multitask_finetuning", "demo"
    cfg.stage.learning_rates = {"projector": 1e-5}
    cfg.run.output_dir = "run"
    tracker = WandbTracker(tracking(), folder, as_plain(cfg), step=first)
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
    assert f"{run_id} resumes after step 2" in printed


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


def test_answers_data_and_alerts_are_in_what_wandb_writes(tmp_path):
    tracker = WandbTracker(tracking(), tmp_path / "run", {}, step=0)
    picture = np.zeros((28, 56, 3), np.uint8)
    picture[:, 28:] = 200
    asked = {"source": "count", "question": "How many?", "expected": "2"}
    rows = [
        ShownAnswer(**asked, key="a.tar/1", picture=picture, answer="3", scores={"exact_match": 0.0}),
        ShownAnswer(**asked, key="a.tar/2", picture=None, answer="2", scores={}),
    ]
    tracker.answers(rows, 4)
    (tmp_path / "contents.json").write_text("{}")
    tracker.data([tmp_path / "contents.json"], {"train": {"fingerprint": "0123"}})
    tracker.alert("step skipped", "step 4 is skipped", is_bad=True)
    tracker.finish()

    (log,) = (tmp_path / "run").rglob("*.wandb")
    found = list(records(log))
    artifacts = {
        one.artifact.type: one.artifact for one in found if one.WhichOneof("record_type") == "artifact"
    }
    files = {one.path: Path(one.local_path) for kind in artifacts.values() for one in kind.manifest.contents}
    assert all(tmp_path in file.parents for file in files.values()), "an offline run is whole in its folder"

    content = json.loads(files["held_out_answers.table.json"].read_text())
    assert content["columns"][:2] == ["source", "sample"]
    assert content["columns"][-1] == "exact_match"
    first, second = content["data"]
    assert [first[0], *first[3:]] == ["count", "How many?", "2", "3", 0.0]
    assert second[2] is None
    assert second[-1] is None
    assert np.array_equal(np.asarray(Image.open(files[first[2]["path"]])), picture)

    (alert,) = [one.alert for one in found if one.WhichOneof("record_type") == "alert"]
    assert (alert.title, alert.level) == ("step skipped", "WARN")
    assert json.loads(artifacts["dataset"].metadata)["train"] == {"fingerprint": "0123"}
    assert files["contents.json"].read_text() == "{}"


def cores() -> list[int]:
    """W&B's own processes that this one started."""
    return [
        pid
        for pid in children(os.getpid())
        if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes() and process_state(pid) != GONE
    ]


def at_first_sight(number: int) -> threading.Thread:
    """Sends a signal to W&B's process as soon as there is one."""

    def send() -> None:
        while not (found := cores()):
            time.sleep(0.001)
        os.kill(found[0], number)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def write_until_it_is_lost(tracker: WandbTracker, write) -> None:
    deadline = time.monotonic() + 60
    while tracker._run is not None:
        assert time.monotonic() < deadline
        write()
        time.sleep(0.02)


@pytest.mark.parametrize("place", ["init", "log", "answers", "data", "alert", "finish"])
def test_a_process_of_wandb_that_is_killed_ends_its_run_and_neither_ours_nor_the_next(
    place, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    row = ShownAnswer(source="a", key="b", picture=None, question="c", expected="d", answer="e", scores={})
    (tmp_path / "file").touch()
    killer = at_first_sight(signal.SIGKILL) if place == "init" else None
    tracker = WandbTracker(tracking(), tmp_path, as_plain(TrainConfig()), step=0)
    writes = {
        "log": lambda: tracker.log({"loss": 1.0}, 1),
        "answers": lambda: tracker.answers([row], 1),
        "data": lambda: tracker.data([tmp_path / "file"], {}),
        "alert": lambda: tracker.alert("title", "text", is_bad=True),
        "finish": lambda: tracker.finish(1),
    }
    if killer is None:
        os.kill(cores()[0], signal.SIGKILL)
    else:
        killer.join()
    write_until_it_is_lost(tracker, writes.get(place, writes["log"]))
    said = capsys.readouterr().out
    assert sum(said.count(told) for told in ("gets no", "has not taken all")) == 1
    for write in writes.values():
        write()
    assert capsys.readouterr().out == ""
    assert cores() == []
    launch(tmp_path / "next", 0, 2, exit_code=0)
    (log,) = (tmp_path / "next").rglob("*.wandb")
    assert [row["step"] for row in read_run(log)[2]] == [0, 1]


def test_a_process_of_wandb_that_hangs_at_the_end_does_not_keep_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb_tracker, "SECONDS_TO_FINISH", 0.5)
    monkeypatch.setattr(wandb_tracker, "SECONDS_TO_DISCARD", 0.2)
    tracker = WandbTracker(tracking(), tmp_path, as_plain(TrainConfig()), step=0)
    (core,) = cores()
    os.kill(core, signal.SIGSTOP)
    try:
        tracker.log({"loss": 1.0}, 1)
        tracker.finish()
        said = capsys.readouterr().out
        assert "W&B has not taken all of this run: it hangs for 0.5 s. To upload it: wandb sync" in said
    finally:
        os.kill(core, signal.SIGKILL)


def test_what_an_end_came_to_is_known_also_where_wandb_asks_to_exit():
    """teardown raises SystemExit where its process did not end with 0; a thread would lose that."""
    assert _within(60, lambda: sys.exit(3)) == "its process ended with 3"
    assert _within(60, lambda: {}["key"]) == "KeyError('key')"
    assert _within(60, lambda: None) is None


def test_nested_figures_are_flat_and_none_is_left_out():
    nested = {"held_out": {"count": {"accuracy": 0.5, "loss": None}}, "step": 3}
    assert flat_figures(nested) == {"held_out/count/accuracy": 0.5, "step": 3}
