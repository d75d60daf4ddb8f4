"""How DeepSpeed's state is written and read: a disk that is full stops no other rank, and reading runs no code."""

from __future__ import annotations

import os
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors import SafetensorError

SAFE_CLASSES = [ZeroStageEnum, LossScaler, fragment_address]
"""The only classes, beside torch's tensors and Python's own containers, that DeepSpeed 0.19.8 writes: plain numbers."""


class StateFiles(CheckpointEngine):
    """DeepSpeed's reader and writer of state files, in place of its TorchCheckpointEngine.

    That one raises where the disk is full, on one rank, while the others wait in the barrier that follows; and it reads
    pickles, which may run any code.
    """

    def __init__(self) -> None:
        super().__init__(None)
        self.name = "StateFiles"
        self.problem: Exception | None = None  # of the save in progress, on this rank

    def create(self, info: CheckpointCommitInfo) -> None:
        """A save begins."""
        self.problem = None

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file, or keep the reason for ``problem``: DeepSpeed's next act is a barrier."""
        try:
            torch.save(state_dict, path)
        except Exception as error:
            if not is_of_the_disk(error):
                raise
            self.problem = error

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """As os.makedirs, with the same rule."""
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.problem = error

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file.

        Raises pickle.UnpicklingError where it holds more than tensors, numbers and SAFE_CLASSES.
        """
        with torch.serialization.safe_globals(SAFE_CLASSES):
            return torch.load(path, map_location=map_location, weights_only=True)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """A save ends. Whether it is whole is decided over all ranks, not here."""
        return True


def is_of_the_disk(error: Exception) -> bool:
    """Whether a file could not be written. On a full disk torch's message names only a line of its own writer."""
    return isinstance(error, OSError | SafetensorError) or "inline_container" in str(error)
