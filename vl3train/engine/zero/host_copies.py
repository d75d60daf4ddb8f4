"""Copies of a state in the host's memory: training goes on while they are written to the disk."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


class HostCopies:
    """The copies of one save at a time. The next save takes over their memory, because page-locking it costs seconds.

    The tensors of a state have the same sizes at each save, and come in the same order.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[Tensor] = []  # of bytes, in the order in which they are taken
        self._num_taken = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of host memory held."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def begin(self) -> None:
        """A save begins: the copies of the one before are void."""
        self._num_taken = 0

    def copy(self, value: Any) -> Any:
        """The same value, with each tensor a contiguous copy on the host. ``finish`` says when they are filled.

        Tensors that are one in ``value`` are one in the copy, so that a file holds them once.
        """
        return self._copy(value, {})

    def _copy(self, value: Any, copied: dict[tuple[Any, ...], Tensor]) -> Any:
        if isinstance(value, Tensor):
            key = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
            if key not in copied or not value.numel():
                copied[key] = self._tensor(value.detach())
            return copied[key]
        if isinstance(value, dict):
            return {key: self._copy(item, copied) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(item, copied) for item in value)
        return copy.deepcopy(value)

    def finish(self) -> None:
        """Return when all copies are filled."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _tensor(self, tensor: Tensor) -> Tensor:
        out = self._buffer(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        return out.copy_(tensor, non_blocking=True)

    def _buffer(self, num_bytes: int) -> Tensor:
        number, self._num_taken = self._num_taken, self._num_taken + 1
        if number == len(self._buffers):
            self._buffers.append(torch.empty(0, dtype=torch.uint8))
        if self._buffers[number].nbytes != num_bytes:
            if self._device.type == "cuda" and self._buffers[number].nbytes:
                cudart = torch.cuda.cudart()
                torch.cuda.check_error(int(cudart.cudaHostUnregister(self._buffers[number].data_ptr())))
            self._buffers[number] = page_locked(num_bytes, self._device)
        return self._buffers[number]


def page_locked(num_bytes: int, device: torch.device) -> Tensor:
    """Bytes on the host, page-locked where ``device`` is a GPU: it writes to them at the full rate of its link.

    Not through torch's own allocator, which takes the next power of two.
    """
    out = torch.empty(num_bytes, dtype=torch.uint8)
    if device.type == "cuda":
        cudart = torch.cuda.cudart()
        torch.cuda.check_error(int(cudart.cudaHostRegister(out.data_ptr(), num_bytes, 0)))
    return out
