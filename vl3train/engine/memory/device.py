"""A device's memory counters, in bytes."""

from __future__ import annotations

import gc
from typing import Protocol

import torch

from vl3train.engine.ranks import RunError

MARGIN = 0.03
"""Share of what this process may hold that stays free: packs of changing lengths fragment the memory."""


class DeviceMemory(Protocol):
    """A device's counters, in bytes."""

    def limit(self) -> int:
        """What this process may hold: all that other processes do not use, less a margin."""
        ...

    def held(self) -> int:
        """What tensors take now."""
        ...

    def peak(self) -> int:
        """The most that tensors took since ``reset_peak``."""
        ...

    def reset_peak(self) -> None:
        """Start to measure a new peak."""
        ...


class CudaMemory:
    """The counters of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def limit(self) -> int:  # noqa: D102 - as DeviceMemory says
        free, _ = torch.cuda.mem_get_info(self._device)
        return int((free + torch.cuda.memory_reserved(self._device)) * (1 - MARGIN))

    def held(self) -> int:  # noqa: D102
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:  # noqa: D102
        return torch.cuda.max_memory_allocated(self._device)

    def reset_peak(self) -> None:  # noqa: D102
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)


def device_memory(device: torch.device) -> DeviceMemory:
    """The counters of a device; RunError where it has none."""
    if device.type != "cuda":
        raise RunError(
            f"machine.memory=auto measures a GPU, and this run is on {device.type}: set machine.memory=given"
        )
    return CudaMemory(device)
