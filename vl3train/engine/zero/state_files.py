"""How DeepSpeed's state is taken, written and read: taken in memory first, and reading runs no code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors import SafetensorError
from safetensors.torch import load_file

from vl3train.engine.zero.host_copies import HostCopies
from vl3train.model.weights.headers.files import read_stored

SAFE_CLASSES = [ZeroStageEnum, LossScaler, fragment_address]
"""The only classes, beside torch's tensors and Python's own containers, that DeepSpeed 0.19.8 writes: plain numbers."""


WEIGHTS_IN = "weights_in"
"""Key of a state file: the folder beside ``engine/`` that has the weights of the model, in Hugging Face form. Absent in
checkpoints of adapters, of ZeRO-3, and of builds before this: their state files have them."""
SAME = "same_weights"
"""Key of a state file: names of tied weights, each with the name under which ``weights_in`` has it."""
MODEL = "model."
"""What DeepSpeed's names of weights have before Hugging Face's: the attribute of PackedModel."""


class StateFiles(CheckpointEngine):
    """DeepSpeed's reader and writer of state files, in place of its TorchCheckpointEngine.

    That one writes at once: training stands still meanwhile, and where the disk is full, it raises on one rank while
    the others wait in the barrier that follows. And it reads pickles, which may run any code.
    """

    def __init__(self) -> None:
        super().__init__(None)
        self.name = "StateFiles"
        self.copies: HostCopies | None = None
        self.taken: dict[str, Any] = {}
        """What DeepSpeed wanted to write in the last save: path and content, copied where there are ``copies``."""

    def create(self, info: CheckpointCommitInfo) -> None:
        """A save begins."""
        self.taken = {}

    def save(self, state_dict: Any, path: str) -> None:
        """Take what one file will hold."""
        self.taken[path] = state_dict if self.copies is None else self.copies.copy(state_dict)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: who writes the files makes their folders."""

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file, as ``read_state``."""
        return read_state(Path(path), map_location=map_location)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """A save ends. Whether it is whole is decided over all ranks, not here."""
        return True


def read_state(path: Path, *, map_location: Any = "cpu", mmap: bool | None = None) -> Any:
    """One state file, with the weights that lie in Hugging Face form beside it.

    Raises pickle.UnpicklingError where it holds more than tensors, numbers and SAFE_CLASSES.
    """
    with torch.serialization.safe_globals(SAFE_CLASSES):
        content = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    if WEIGHTS_IN in content:
        folder = path.parents[2] / content[WEIGHTS_IN]
        for file in read_stored(folder).files:  # not what somebody laid beside them, which no digest covers
            content["module"].update({MODEL + name: value for name, value in load_file(file).items()})
        for one, other in content[SAME].items():
            content["module"][one] = content["module"][other]
    return content


def is_of_the_disk(error: Exception) -> bool:
    """Whether a file could not be written. On a full disk torch's message names only a line of its own writer."""
    return isinstance(error, OSError | SafetensorError) or "inline_container" in str(error)
