"""What a checkpoint holds of an engine, in memory; weights are in it once, for the Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vl3train.engine.zero.state_files import MODEL, SAME, WEIGHTS_IN

FOLDER = "state"
"""Within a checkpoint's ``engine/``: DeepSpeed's tag."""


@dataclass(frozen=True, slots=True)
class EngineState:
    """One rank's share of an engine's state."""

    files: dict[str, Any]
    """Content of each state file, by its name."""
    weights: dict[str, Tensor]
    """On rank 0 the whole weights under the model's own names, tied ones once; with adapters only what trains."""

    def write(self, folder: Path) -> None:
        """Write the state files into FOLDER below ``folder``, a checkpoint's ``engine/``. Without ``weights``."""
        for name, content in self.files.items():
            torch.save(content, folder / FOLDER / name)


def bytes_of(content: Any) -> int:
    """Bytes of the tensors in a state; one that is in it twice counts once."""
    found: dict[tuple[int, int], int] = {}

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            found[value.data_ptr(), value.nbytes] = value.nbytes
        elif isinstance(value, dict):
            for item in value.values():
                look(item)
        elif isinstance(value, list | tuple):
            for item in value:
                look(item)

    look(content)
    return sum(found.values())


def take_weights(files: dict[str, Any], model: torch.nn.Module, *, is_all: bool) -> dict[str, Tensor]:
    """The weights that DeepSpeed's file of a stage below 3 has, under the model's own names.

    Where they are all of the model's (``is_all``), the file names the folder that has them, and leaves them out.
    """
    [content] = [content for content in files.values() if "module" in content]
    module = content["module"]
    weights = {name: module[MODEL + name] for name, _ in model.named_parameters() if MODEL + name in module}
    if is_all:
        ours = {tensor.data_ptr(): name for name, tensor in weights.items()}
        rest = {name: tensor for name, tensor in module.items() if name.removeprefix(MODEL) not in weights}
        tied = {name: MODEL + ours[at] for name, one in rest.items() if (at := one.data_ptr()) in ours}
        content["module"] = {name: tensor for name, tensor in rest.items() if name not in tied}
        content.update({WEIGHTS_IN: "weights", SAME: tied})
    return weights
