"""Everything that keeps a run from starting with the folders that its config names. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Set
from pathlib import Path

from vl3train.config import paths
from vl3train.config.checks.start import start_problems
from vl3train.config.problems import Problem
from vl3train.config.schema import TrainConfig
from vl3train.contracts.shapes import LANGUAGE_MODELS
from vl3train.model.weights.headers.described import (
    Described,
    encoder_tensors,
    language_tensors,
    projector_tensors,
)
from vl3train.model.weights.headers.faults import Fault
from vl3train.model.weights.headers.folder import Kind, inspect_folder
from vl3train.model.weights.headers.vocabulary import read_vocabulary, vocabulary_faults

START_KEYS = {
    "stage.init_from",
    "model.vision_encoder_from",
    "model.language_model_from",
    "model.tokenizer_from",
}
PARTS = {"vision_encoder_from": Kind.encoder, "language_model_from": Kind.language_model}


def weights_problems(cfg: TrainConfig, known: Set[str]) -> list[Problem]:
    """What is wrong with the weights and the tokenizer to start from: files, tensors, sizes, token ids.

    A name on the hub is not looked up: its folder is inspected after the download (model/weights/from_parts.py). A run
    that resumes reads its own checkpoint only.

    Args:
        cfg: of the run.
        known: keys of problems that were found before; what they name is not read.
    """
    if (Path(cfg.run.output_dir).expanduser() / "checkpoints" / "latest").is_file():
        return []
    if start_problems(cfg) and not known & START_KEYS:
        return []  # the rules stopped at a number they divide by, before they looked at the folders
    if paths.starts_from_parts(cfg):
        named = [(f"model.{option}", getattr(cfg.model, option), kind) for option, kind in PARTS.items()]
    else:
        named = [("stage.init_from", cfg.stage.init_from, Kind.whole)]
    found: list[Problem] = []
    described: list[Described] = []
    for key, name, kind in named:
        if key in known or name is None or not paths.is_path(name):
            continue
        folder = {
            Kind.whole: paths.resolve_weights,
            Kind.encoder: paths.encoder_folder,
            Kind.language_model: lambda name: Path(name).expanduser(),
        }[kind](name)
        inspected = inspect_folder(folder, kind)
        found += _problems(key, name, folder, inspected.faults)
        if inspected.described is not None:
            described.append(inspected.described)
    found += _size_problems(cfg, described)
    language = next((one for one in described if one.language_model is not None), None)
    if not {named[-1][0], "model.tokenizer_from"} & known:
        found += _tokenizer_problems(cfg, language)
    return found


def _problems(key: str, name: object, folder: Path, faults: Iterable[Fault]) -> list[Problem]:
    inside = "" if Path(str(name)).expanduser() == folder else f"in {folder}: "
    return [Problem(key, name, f"{inside}{fault.what}", fault.way_out) for fault in faults]


def _tokenizer_problems(cfg: TrainConfig, language: Described | None) -> list[Problem]:
    """What is wrong with the run's tokenizer, and where it does not belong to the language model."""
    source = paths.tokenizer_source(cfg)
    if isinstance(source, str):
        if not paths.is_path(source):
            return []
        source = Path(source).expanduser()
    in_parts = paths.starts_from_parts(cfg)
    first = "model.language_model_from" if in_parts else "stage.init_from"
    key = first if cfg.model.tokenizer_from is None else "model.tokenizer_from"
    name = cfg.model.tokenizer_from or (str(source) if in_parts else cfg.stage.init_from)
    if not source.is_dir():
        return []
    vocabulary, faults = read_vocabulary(source)
    if vocabulary is not None and language is not None and language.language_model is not None:
        faults = vocabulary_faults(vocabulary, language.language_model.vocab_size, language.token_ids)
    return _problems(key, name, source, faults)


def part_sizes(described: Iterable[Described]) -> dict[str, int]:
    """Parameters of each part, where the config.json of its folder says them; a tied head counts once."""
    encoder = language = None
    tied = False
    for one in described:
        encoder = one.encoder or encoder
        if one.language_model is not None:
            language, tied = one.language_model, one.tied
    sizes = {}
    if encoder is not None:
        sizes["vision_encoder"] = _count(encoder_tensors(encoder))
    if encoder is not None and language is not None:
        sizes["projector"] = _count(projector_tensors(encoder.hidden_size, language.hidden_size))
    if language is not None:
        sizes["language_model"] = _count(language_tensors(language, tied=tied))
    return sizes


def _count(tensors: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in tensors.values())


def _size_problems(cfg: TrainConfig, described: list[Described]) -> list[Problem]:
    sizes = part_sizes(described)
    wrong = [
        f"its {part} has {sizes[part]:,} parameters, model={cfg.model.name} has {size:,}"
        for part, size in cfg.model.num_parameters.items()
        if part in sizes and sizes[part] != size
    ]
    if not wrong:
        return []
    shapes = [one.language_model for one in described]
    fits = [name for name, shape in LANGUAGE_MODELS.items() if shape in shapes]
    way_out = f"choose model={fits[0]}" if fits and fits[0] != cfg.model.name else "choose model=own"
    whole = not paths.starts_from_parts(cfg)
    key, value = ("stage.init_from", cfg.stage.init_from) if whole else ("model.name", cfg.model.name)
    what = "the model to start from has another size: " + "; ".join(wrong)
    return [Problem(key, value, what, way_out)]
