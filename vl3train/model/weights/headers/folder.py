"""Everything that is wrong with a folder that a stage starts from: files, tensors, sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from vl3train.model.weights.headers.described import (
    Described,
    describe_encoder,
    describe_language_model,
    describe_whole,
)
from vl3train.model.weights.headers.faults import Fault, listed, read_object
from vl3train.model.weights.headers.files import StoredWeights, read_stored

FLOATS = {"F16", "BF16", "F32", "F64"}
HEAD = "lm_head.weight"


class Kind(Enum):
    """What a folder is to hold."""

    whole = "a whole VideoLLaMA3"
    encoder = "a SigLIP or VideoLLaMA3"
    language_model = "a Qwen2 or Qwen2.5"


READ: dict[Kind, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Described]]] = {
    Kind.whole: (("video_llama_3", "videollama3_qwen2"), describe_whole),
    Kind.encoder: (("siglip", "siglip_vision_model", "video_llama_3"), describe_encoder),
    Kind.language_model: (("qwen2",), describe_language_model),
}
"""The ``model_type`` of each kind, and who reads its config.json."""


@dataclass(frozen=True, slots=True)
class Inspected:
    """A folder's model: what its config.json says (None: nothing that can be read), and all that is wrong."""

    described: Described | None
    faults: list[Fault]


def inspect_folder(folder: Path, kind: Kind) -> Inspected:
    """Read config.json and the headers of the weight files; all faults are found together."""
    config, fault = read_object(folder / "config.json")
    stored = read_stored(folder)
    faults = [*([fault] if fault is not None else []), *stored.faults]
    model_type = config.get("model_type")
    known, describe = READ[kind]
    if fault is None and model_type not in known:
        what = f"holds a {model_type} model, not {kind.value} (model_type {' or '.join(known)})"
        return Inspected(None, [Fault(what, "name another folder"), *stored.faults])
    if fault is not None:
        return Inspected(None, faults)
    described = describe(config)
    faults += described.faults
    if model_type == "video_llama_3" and not stored.has_index:
        what = "the index of the weight files (*.index.json) is missing"
        faults.append(Fault(what, "copy or download it as well"))
    if not described.faults:
        faults += _tensor_faults(described, stored)
    return Inspected(described, faults)


def _tensor_faults(described: Described, stored: StoredWeights) -> list[Fault]:
    """Tensors that are missing, of no use or of another shape than config.json says."""
    expected = described.tensors()
    optional = {HEAD} if described.tied and described.language_model is not None else set()
    found, unused = {}, []
    for name, tensor in stored.tensors.items():
        renamed = described.rename(name)
        if renamed in expected:
            found[renamed] = tensor
        elif renamed is not None and renamed not in optional:
            unused.append(name)
    lost = {described.rename(name) for name in stored.lost}
    other = "take the checkpoint whole, or the config.json that belongs to the weights"
    faults = []
    if stored.complete and (missing := expected.keys() - found.keys() - lost):
        faults.append(
            Fault(f"{len(missing)} of {len(expected)} tensors are missing: {listed(missing)}", other)
        )
    if unused:
        faults.append(Fault(f"{len(unused)} tensors have no place in the model: {listed(unused)}", other))
    shapes = {
        f"{name} is {list(tensor.shape)} in {tensor.file}, {list(expected[name])} by config.json"
        for name, tensor in found.items()
        if tensor.shape != expected[name]
    }
    if shapes:
        faults.append(Fault(f"{len(shapes)} tensors have another shape: {listed(shapes, 3)}", other))
    if numbers := {tensor.dtype for tensor in found.values()} - FLOATS:
        what = f"weights are {listed(numbers)}, not floating-point numbers of 16 bits or more"
        faults.append(Fault(what, "take the checkpoint that was not quantized"))
    return faults
