"""What the original code's training writes of a part of the model: the projector, or LoRA and what trains beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from vl3train.model.weights.headers.faults import Fault, listed, read_object, refuse
from vl3train.model.weights.headers.files import StoredTensor, tensors_of
from vl3train.model.weights.headers.names import from_original
from vl3train.model.weights.streaming import Reader, Source

PEFT = "base_model.model."
PROJECTOR, BESIDE_LORA = "mm_projector.bin", "non_lora_trainables.bin"


def is_parts(source: Path) -> bool:
    """Whether ``source`` is a file or folder of parts, and no whole model."""
    if source.is_file() and source.suffix == ".bin":
        return True
    whole = any(source.glob("model*.safetensors")) or any(source.glob("pytorch_model*.bin"))
    return not whole and any(
        (source / name).is_file() for name in (PROJECTOR, BESIDE_LORA, "adapter_config.json")
    )


def add_parts(source: Path, weights: dict[str, Source]) -> bool:
    """Put the parts in place of the weights of the whole model; returns whether there are adapters beside them.

    Raises ValueError for a damaged file, and for a part that the model has not.
    """
    folder = source.parent if source.is_file() else source
    names = [source.name] if source.is_file() else [PROJECTOR, BESIDE_LORA]
    for file in (folder / name for name in names):
        if not file.is_file():
            continue
        tensors, fault = tensors_of(file)
        refuse(file, [fault] if fault else [])
        parts = {plain_name(name): Source(file, name, one) for name, one in tensors.items()}
        if unknown := parts.keys() - weights.keys():
            what = f"{len(unknown)} weights are not in the model of --base: {listed(unknown)}"
            refuse(file, [Fault(what, "name the model that it was trained from")])
        weights |= parts
    return not source.is_file() and (folder / "adapter_config.json").is_file()


def plain_name(name: str) -> str:
    """The name in the model of a weight under peft's prefix.

    >>> plain_name("base_model.model.model.mm_projector.readout.0.bias")
    'model.projector.readout.0.bias'
    """
    name = name.removeprefix(PEFT).replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
    return from_original(name) or name


def write_adapter(source: Path, folder: Path, *, base: Path) -> None:
    """Write the adapters of ``source`` for the model in Hugging Face form; they name ``base``, their weights.

    The original lists plain names such as q_proj, which would match in both towers here: a pattern takes their place.
    """
    config, fault = read_object(source / "adapter_config.json")
    refuse(source, [fault] if fault else [])
    file = next(
        (f for f in (source / "adapter_model.safetensors", source / "adapter_model.bin") if f.is_file()), None
    )
    if file is None:
        raise ValueError(f"{source} has an adapter_config.json and no adapter_model.safetensors or .bin")
    tensors: dict[str, StoredTensor]
    tensors, fault = tensors_of(file)
    refuse(source, [fault] if fault else [])
    folder.mkdir()
    with Reader() as reader:
        renamed: dict[str, Any] = {
            PEFT + plain_name(name): reader.tensor(Source(file, name, one)) for name, one in tensors.items()
        }
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = sorted({name.removeprefix(PEFT).split(".lora_")[0].split(".")[-1] for name in renamed})
    config["target_modules"] = rf"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(modules)})"
    config["base_model_name_or_path"] = str(base.absolute())
    config["task_type"] = None
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
