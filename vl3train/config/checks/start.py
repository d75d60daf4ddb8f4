"""What a run starts from: published parts in stage 1; in stages 2 to 4 the stage before, or a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from vl3train.config import paths
from vl3train.config.problems import Problem
from vl3train.config.schema import TrainConfig

PART_MODEL_TYPES = {
    "vision_encoder_from": ("siglip", "siglip_vision_model", "video_llama_3"),
    "language_model_from": ("qwen2",),
}
"""The ``model_type`` that model/weights/from_parts.py accepts for each part."""


def starts_from(cfg: TrainConfig) -> str:
    """Where the run's weights come from, in words."""
    if paths.starts_from_parts(cfg):
        return (
            f"vision encoder {cfg.model.vision_encoder_from}, "
            f"language model {cfg.model.language_model_from}, "
            f"projector with random weights (seed {cfg.run.seed})"
        )
    assert cfg.stage.init_from is not None, "a config without problems has it"
    folder = Path(cfg.stage.init_from).expanduser()
    if not folder.exists():
        return f"{folder}, which does not exist yet"
    if not paths.is_run_folder(folder):
        return f"the checkpoint {folder}"
    if not (folder / "checkpoints" / "latest").is_file():
        return f"{folder}, which has no complete checkpoint yet"
    _, adapter = paths.resolve_start(folder)
    merged = ", its adapters merged in float32" if adapter is not None else ""
    return f"{run_stage(folder) or 'the run'} in {folder}, {paths.latest_checkpoint(folder).name}{merged}"


def run_stage(run_folder: Path) -> str | None:
    """Name of the stage that a run trained."""
    stage = _run_stage_section(run_folder)
    return None if stage is None else str(stage["name"])


def start_problems(cfg: TrainConfig) -> list[Problem]:
    """Every reason why the run has no weights or no tokenizer to start from."""
    if paths.starts_from_parts(cfg):
        return _parts_problems(cfg)
    found = _init_from_problems(cfg)
    tokenizer = cfg.model.tokenizer_from
    return [*found, *_tokenizer_problems(tokenizer)]


def _parts_problems(cfg: TrainConfig) -> list[Problem]:
    found = []
    if cfg.stage.init_from is not None:
        what = "stage 1 starts from model.vision_encoder_from and model.language_model_from"
        found.append(
            Problem("stage.init_from", cfg.stage.init_from, what, "do not set it, or choose a later stage")
        )
    for option, known_types in PART_MODEL_TYPES.items():
        key, name = f"model.{option}", getattr(cfg.model, option)
        is_encoder = option == "vision_encoder_from"
        kind = "SigLIP" if is_encoder else "Qwen2 or Qwen2.5"
        way_out = f"name a {kind} checkpoint in Hugging Face form: a folder, or a name on the hub"
        if is_encoder:
            way_out += "; or the run or folder of a VideoLLaMA3, whose encoder is then taken"
        if name is None:
            found.append(Problem(key, None, "stage 1 has nothing to start from", way_out))
        elif paths.is_path(name):
            if cfg.model.name == "debug":
                way_out = f"make it with `vl3train demo {cfg.data.root}`"
            found += _folder_problems(key, name, known_types, way_out)
    return [*found, *_tokenizer_problems(cfg.model.tokenizer_from)]


def _folder_problems(key: str, name: str, known_types: tuple[str, ...], way_out: str) -> list[Problem]:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return [Problem(key, name, "no such folder", way_out)]
    try:
        found_type = paths.model_type(
            paths.encoder_folder(name) if "video_llama_3" in known_types else folder
        )
    except (FileNotFoundError, ValueError) as error:
        return [Problem(key, name, str(error), way_out)]
    if found_type not in known_types:
        return [Problem(key, name, f"holds a {found_type} model", way_out)]
    return _unfinished_problems(key, name)


def _unfinished_problems(key: str, name: str) -> list[Problem]:
    """Where ``name`` is the folder of a run that has not finished."""
    folder = Path(name).expanduser()
    if not paths.is_run_folder(folder) or (folder / paths.FINISHED).is_file():
        return []
    way_out = (
        "start that run again until it is finished; to start from it as it is, name its checkpoint: "
        f"{paths.latest_checkpoint(folder)}"
    )
    return [Problem(key, name, "is a run that is not finished", way_out)]


def _tokenizer_problems(name: str | None) -> list[Problem]:
    if name is None or not paths.is_path(name):
        return []
    folder = Path(name).expanduser()
    if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
        return []
    way_out = "name a folder that has one, or a name on the hub"
    return [Problem("model.tokenizer_from", name, "has no tokenizer.json", way_out)]


def _init_from_problems(cfg: TrainConfig) -> list[Problem]:
    number, init_from = cfg.stage.number, cfg.stage.init_from
    key = "stage.init_from"
    way_out = f"name the output folder of stage {number - 1}, or a video_llama_3 checkpoint's folder"
    if init_from is None:
        return [Problem(key, None, f"stage {number} has nothing to start from", way_out)]
    folder = Path(init_from).expanduser()
    if not folder.is_dir():
        if not paths.is_path(init_from):
            way_out = f"download it first: hf download {init_from} --local-dir FOLDER"
        return [Problem(key, init_from, "no such folder", way_out)]
    if folder.resolve() == Path(cfg.run.output_dir).expanduser().resolve():
        what = "is the run.output_dir of this run"
        return [Problem(key, init_from, what, f"give stage {number} its own output folder")]
    try:
        paths.resolve_weights(folder)
    except (FileNotFoundError, ValueError) as error:
        return [Problem(key, init_from, str(error), way_out)]
    before = _run_stage_section(folder)
    if before is not None and before["number"] < number - 1:
        what = f"is a run of stage {before['number']}, and stage {number - 1} comes between"
        way_out = f"train stage {number - 1} first; to skip it, name the weights folder inside the checkpoint"
        return [Problem(key, init_from, what, way_out)]
    return _unfinished_problems(key, init_from)


def _run_stage_section(folder: Path) -> dict[str, Any] | None:
    file = folder / "config.yaml"
    if not file.is_file():
        return None
    stage = yaml.safe_load(file.read_text())["stage"]
    assert isinstance(stage, dict)
    return stage
