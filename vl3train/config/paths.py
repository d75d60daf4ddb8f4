"""Folders that runs write and start from: what is in them, and where their weights are. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import vl3train
from vl3train.config.input.options import by_present_names
from vl3train.config.plain import as_plain
from vl3train.config.problems import ConfigError, Problem
from vl3train.config.schema import TrainConfig
from vl3train.contracts.files import write_whole
from vl3train.contracts.strict_json import json_text, without_texts

MODEL_TYPES = ("video_llama_3", "videollama3_qwen2")
"""``model_type`` of a checkpoint that stages 2 to 4 can start from: transformers' form, and that of the
original code, which is converted when it is loaded."""


FINISHED = "finished.json"
"""The file that marks a run's folder when its last step is done."""

NOT_TRAINING = ("machine", "tracking", "finetune")
"""Sections that change nothing of what a run computes from its data."""

ONE_LAUNCH = ("stop_after_steps", "max_hours")
"""Options of the section ``run`` that end a launch early and change nothing of the run."""


def shipped_folder(name: str) -> Path:
    """A folder that ships with the package: ``configs`` or ``data_recipes``.

    It is beside the package in a checkout, and inside the package after an installation (see pyproject.toml).
    """
    package = Path(vl3train.__file__).resolve().parent
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"{name} is neither in {package} nor beside it: install vl3train again")


def is_run_folder(folder: Path) -> bool:
    """Whether a training run wrote this folder."""
    return (folder / "config.yaml").is_file() or (folder / "checkpoints").is_dir()


def is_finished(cfg: TrainConfig) -> bool:
    """Whether a run with exactly these options has finished in its output folder.

    Raises ConfigError where the file that says so is damaged.
    """
    file = Path(cfg.run.output_dir) / FINISHED
    if not file.is_file():
        return False
    try:
        finished = by_present_names(without_texts(json.loads(file.read_text(encoding="utf-8"))))
        defaults = what_trains(TrainConfig())  # of options that the build did not have which wrote the file
        as_written = {name: {**defaults.get(name, {}), **of} for name, of in _what_trains(finished).items()}
    except (ValueError, AttributeError, KeyError, TypeError):
        way_out = f"delete {file}: the run then goes on from its newest checkpoint"
        raise ConfigError(
            [Problem("run.output_dir", cfg.run.output_dir, f"{file} is damaged", way_out)]
        ) from None
    return as_written == what_trains(cfg)


def mark_finished(cfg: TrainConfig) -> None:
    """Write the file that ``is_finished`` reads."""
    write_whole(Path(cfg.run.output_dir) / FINISHED, json_text(what_trains(cfg), indent=1))


def what_trains(cfg: TrainConfig) -> dict[str, Any]:
    """The options that decide what a run computes: all but those of NOT_TRAINING and of one launch."""
    return _what_trains(as_plain(cfg))


def _what_trains(options: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: section for name, section in options.items() if name not in NOT_TRAINING}
    run = {name: value for name, value in kept["run"].items() if name not in ONE_LAUNCH}
    return {**kept, "run": run, "adapter": what_adapts(kept["adapter"])}


def what_adapts(adapter: Mapping[str, Any]) -> dict[str, Any]:
    """The options of adapters that count: none of them does where there are no adapters."""
    return dict(adapter) if adapter["kind"] != "none" else {"kind": "none"}


def latest_checkpoint(run_folder: Path) -> Path:
    """The last complete checkpoint of a run; ``checkpoints/latest`` names it."""
    latest = run_folder / "checkpoints" / "latest"
    if not latest.is_file():
        raise FileNotFoundError(f"{run_folder} holds no complete checkpoint yet ({latest} is missing)")
    checkpoint = latest.parent / latest.read_text().strip()
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{latest} names {checkpoint.name}, which does not exist")
    return checkpoint


def resolve_weights(init_from: str | Path) -> Path:
    """The Hugging Face folder (config.json and weights) that ``init_from`` means.

    ``init_from`` is a run's output folder (its latest checkpoint is taken), one of its checkpoints, or a
    Hugging Face folder. Of adapters it is the folder of the weights that they are on. Raises FileNotFoundError that
    says what is missing, ValueError for another model.
    """
    return resolve_start(init_from)[0]


def resolve_start(init_from: str | Path) -> tuple[Path, Path | None]:
    """What ``resolve_weights`` finds, and the folder of the adapters that belong on these weights, or None.

    A run with adapters keeps the weights that they are on in ``base``, and only adapters in each checkpoint. Adapters
    alone, as ``vl3train export --adapter-only`` writes them, name the folder of their weights.
    """
    folder = Path(init_from).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if is_run_folder(folder):
        folder = latest_checkpoint(folder)
    adapter = None
    if (folder / "weights").is_dir():
        folder = folder / "weights"
    elif (folder / "adapter" / "adapter_config.json").is_file():
        adapter, folder = folder / "adapter", _base_of(folder)
    elif (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        adapter, folder = folder, _named_base(folder)
    found = model_type(folder)
    if found not in MODEL_TYPES:
        raise ValueError(f"{folder} holds a {found} model, not {MODEL_TYPES[0]}")
    return folder, adapter


def _base_of(checkpoint: Path) -> Path:
    """The weights that the adapters of a checkpoint are on."""
    inside = checkpoint / "base"  # as `vl3train convert` writes a LoRA checkpoint of the original
    base = inside if inside.is_dir() else checkpoint.parent.parent / "base"
    if not base.is_dir():
        raise FileNotFoundError(
            f"{base} is missing: it holds the weights that the adapters in {checkpoint / 'adapter'} belong to"
        )
    return base


def _named_base(adapter: Path) -> Path:
    """The weights that adapters alone say they are on."""
    if not (base := adapter.parent.parent.parent / "base").is_dir() or adapter.name != "adapter":
        try:
            named = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
            base = Path(str(named["base_model_name_or_path"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{adapter / 'adapter_config.json'} names no weights: {error!r}") from error
    if not base.is_dir():
        raise FileNotFoundError(
            f"{adapter} holds adapters only, for the weights of {base}, which is no folder here; "
            "put it there, or name it in base_model_name_or_path of adapter_config.json"
        )
    return base


def encoder_folder(vision_encoder_from: str) -> Path:
    """The Hugging Face folder whose encoder ``model.vision_encoder_from`` means: a SigLIP, or a whole VideoLLaMA3.

    A VideoLLaMA3 may also be named by the folder of its run, or by a checkpoint. Raises FileNotFoundError or ValueError
    for a folder that holds neither.
    """
    folder = Path(vision_encoder_from).expanduser()
    if (folder / "config.json").is_file() or not folder.is_dir():
        return folder
    weights, adapter = resolve_start(folder)
    if adapter is not None:
        raise ValueError(f"{folder} holds adapters; `vl3train export` merges them; name what it writes")
    return weights


def is_tuned_encoder(vision_encoder_from: str | None) -> bool:
    """Whether this is the encoder of a VideoLLaMA3 on this machine: images of any size were taught to it already."""
    if vision_encoder_from is None or not Path(vision_encoder_from).expanduser().is_dir():
        return False
    try:
        return model_type(encoder_folder(vision_encoder_from)) == MODEL_TYPES[0]
    except (FileNotFoundError, ValueError):
        return False


def starts_from_parts(cfg: TrainConfig) -> bool:
    """Whether the run puts its model together: in stage 1, and in a later one with the encoder of another VideoLLaMA3.

    The paper's 7B has the tuned encoder of the 2B (arXiv:2501.13106, section 4.1).
    """
    return cfg.stage.number == 1 or (
        cfg.stage.init_from is None and is_tuned_encoder(cfg.model.vision_encoder_from)
    )


def tokenizer_source(cfg: TrainConfig) -> str | Path:
    """Folder or hub name of the tokenizer that a run with this config takes.

    The commands that open an index must take the tokenizer of the run: the index holds the tokenizer's checksum.
    Raises FileNotFoundError or ValueError when ``stage.init_from`` is read and is no folder of weights.
    """
    if cfg.model.tokenizer_from is not None:
        return cfg.model.tokenizer_from
    if cfg.stage.init_from is not None:
        return resolve_weights(cfg.stage.init_from)
    assert cfg.model.language_model_from is not None, "config rules refuse a run without a tokenizer"
    return cfg.model.language_model_from


def model_type(folder: Path) -> str:
    """``model_type`` of a Hugging Face folder. Raises FileNotFoundError or ValueError when it has none."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is neither a run nor a checkpoint")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{file} names no model_type")
    return str(config["model_type"])


def is_path(name: str) -> bool:
    """Whether ``name`` is a path on this machine, and not a name on the Hugging Face hub (``org/model``).

    >>> is_path("google/siglip-so400m-patch14-384"), is_path("./parts/vision")
    (False, True)
    """
    path = Path(name).expanduser()
    if path.exists() or path.is_absolute() or name.startswith((".", "~")):
        return True
    # A relative path whose first folder is here: a mistyped path rather than a hub name.
    return len(path.parts) != 2 or Path(path.parts[0]).is_dir()


def short_names(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: its own, with the folders before it where two are alike.

    >>> short_names([Path("/a/one"), Path("/a/two")]), short_names([Path("/a/x/step_5"), Path("/a/y/step_5")])
    (['one', 'two'], ['x-step_5', 'y-step_5'])

    Raises ValueError where a folder is given twice.
    """
    whole = [folder.expanduser().resolve() for folder in folders]
    if twice := [str(folder) for number, folder in enumerate(whole) if folder in whole[:number]]:
        raise ValueError(f"{', '.join(twice)}: given twice")
    depth = 1
    while len(set(names := ["-".join(folder.parts[-depth:]).lstrip("/") for folder in whole])) < len(whole):
        depth += 1
    return names
