"""The model to fine-tune: its folder, or its name on the hub; its size, and how its processor sees pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl3train.config.paths import is_path, resolve_weights
from vl3train.config.schema import PARTS
from vl3train.contracts.shapes import ENCODER, LANGUAGE_MODELS, TowerShape
from vl3train.model.weights.headers.described import encoder_tensors, language_tensors
from vl3train.model.weights.headers.folder import Kind, inspect_folder
from vl3train.preview.plan_estimate import ModelSizes

OWN_SIZE = "own"
"""configs/model/own.yaml: a model of a size that was not published."""
OF_PART: dict[str, tuple[str, ...]] = {
    "vision_encoder": ("model.vision_model.",),
    "projector": ("model.projector.",),
    "language_model": ("model.language_model.", "lm_head."),
}
"""How the names of a part's weights begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartModel:
    """What a fine-tuning starts from."""

    folder: Path
    size: str  # a choice of the group model
    options: dict[str, Any]  # options that follow from its files, by their full names
    sizes: ModelSizes | None  # None where its headers are damaged


def find_model(name: str, tell: Any) -> StartModel:
    """The model that a folder or a name on the hub means; a name is downloaded where there is a network.

    Raises:
        ValueError: there is no such folder, it holds another model, or the hub cannot be reached.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = download(name, tell)
    folder = folder.resolve()
    try:
        weights = resolve_weights(folder)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"--model {name}: {error}") from error
    described = inspect_folder(weights, Kind.whole).described
    encoder = None if described is None else described.encoder
    language = None if described is None else described.language_model
    size = size_of(encoder, language)
    options = processor_options(weights)
    if size == OWN_SIZE and encoder is not None and language is not None:
        options["model.costs"] = costs_of(encoder, language)
    sizes = None
    if described is not None and encoder is not None and language is not None:
        numbers = parameters_of_parts(described.tensors())
        sizes = ModelSizes(language=language, encoder=encoder, num_parameters=numbers)
    return StartModel(folder=folder, size=size, options=options, sizes=sizes)


def download(name: str, tell: Any) -> Path:
    """The folder of a model of the hub, downloaded unless it is there already.

    Raises:
        ValueError: it is a path and no folder, or it cannot be had; the message has the command that downloads it.
    """
    if is_path(name):
        raise ValueError(
            f"--model {name}: there is no such folder; name one, or a model of the hub as ORG/NAME"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        tell(f"{name} is no folder here: downloading it from the Hugging Face hub")
    try:
        return Path(snapshot_download(name))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ValueError(
            f"--model {name}: no folder here has this name, and it cannot be downloaded "
            f"({' '.join(str(error).split())[:200]}); where there is a network, run `hf download {name} --local-dir "
            "FOLDER`, then give --model FOLDER"
        ) from error


def size_of(encoder: TowerShape | None, language: TowerShape | None) -> str:
    """The published size with these shapes, a choice of the group model; else OWN_SIZE."""
    if encoder != ENCODER:
        return OWN_SIZE
    return next((name for name, shape in LANGUAGE_MODELS.items() if shape == language), OWN_SIZE)


def parameters_of_parts(tensors: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Parameters of each part, from the names and shapes of all weights."""
    return {
        part: _size({name: shape for name, shape in tensors.items() if name.startswith(OF_PART[part])})
        for part in PARTS
    }


def costs_of(encoder: TowerShape, language: TowerShape) -> dict[str, int]:
    """``model.costs`` in kFLOP of a forward pass: twice the parameters; for a pair 2 x layers x hidden_size."""
    return {
        "token": max(1, round(2 * _size(language_tensors(language, tied=True)) / 1000)),
        "token_pair": max(1, round(2 * language.num_layers * language.hidden_size / 1000)),
        "patch": max(1, round(2 * _size(encoder_tensors(encoder)) / 1000)),
        "patch_pair": max(1, round(4 * encoder.num_layers * encoder.hidden_size / 1000)),
    }


def _size(tensors: dict[str, tuple[int, ...]]) -> int:
    total = 0
    for shape in tensors.values():
        size = 1
        for side in shape:
            size *= side
        total += size
    return total


def processor_options(weights: Path) -> dict[str, Any]:
    """How the model's processor merges patches and prunes frames, where that is not the default of a fine-tuning."""
    image, video = _processors(weights)
    found: dict[str, Any] = {}
    if image.get("merge_size") in (1, 2) and image["merge_size"] != 1:
        found["stage.image_merge_size"] = image["merge_size"]
    if video.get("merge_size") in (1, 2) and video["merge_size"] != 2:
        found["stage.video_merge_size"] = video["merge_size"]
    if video.get("use_token_compression") is False:
        found["stage.prune_frames"] = False
    return found


def _processors(weights: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a folder says of its image processor and of its video processor, in one file or in two."""
    whole = _json(weights / "processor_config.json")
    image = whole.get("image_processor") or _json(weights / "preprocessor_config.json")
    video = whole.get("video_processor") or _json(weights / "video_preprocessor_config.json")
    return (image if isinstance(image, dict) else {}), (video if isinstance(video, dict) else {})


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
