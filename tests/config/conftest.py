"""Folders that a config can start from: small, with real config.json files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from vl3train.config.plain import as_plain
from vl3train.config.schema import TrainConfig


def write_config_json(folder: Path, model_type: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def write_run_config(cfg: TrainConfig, folder: Path) -> Path:
    """``config.yaml`` of a run's output folder, as engine/start/folder.py writes it."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(as_plain(cfg), sort_keys=False))
    return file


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a data root and a checkpoint; relative paths start here."""
    (tmp_path / "data").mkdir()
    (tmp_path / "demo").mkdir()
    write_config_json(tmp_path / "data" / "parts" / "vision_encoder", "siglip_vision_model")
    write_config_json(tmp_path / "data" / "parts" / "language_model", "qwen2")
    write_config_json(tmp_path / "demo" / "parts" / "vision_encoder", "siglip_vision_model")
    write_config_json(tmp_path / "demo" / "parts" / "language_model", "qwen2")
    write_config_json(tmp_path / "checkpoint", "video_llama_3")
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "NETRC", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path
