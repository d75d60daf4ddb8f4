"""Layers' inputs that are offloaded to the host's memory between the forward and the backward pass.

A stream of its own copies them to the host while layers compute. The backward pass fetches them one layer ahead. So
neither pass waits for more than one transfer, if the link is fast enough.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_SIDE_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


class HostRows:
    """What one tower's layers offloaded in one forward pass, in the order of the layers."""

    def __init__(self) -> None:
        self._layers: list[list[_Offloaded]] = []

    def keep_input(self, rows: Tensor) -> AbstractContextManager[object]:
        """A context in which autograd offloads ``rows`` where it would keep them. Other tensors stay where they are.

        The same bits come back in the backward pass. ``rows`` on the device are freed with their last other user.
        """
        address, shape = rows.data_ptr(), rows.shape  # not the rows: the hooks outlive the forward pass
        number = len(self._layers)
        layer: list[_Offloaded] = []  # one at most, although two operations may keep the rows
        self._layers.append(layer)

        def pack(tensor: Tensor) -> Tensor | int:
            if tensor.data_ptr() != address or tensor.shape != shape:
                return tensor
            if not layer:
                layer.append(_Offloaded(tensor.detach()))
            return number

        def unpack(kept: Tensor | int) -> Tensor:
            return kept if isinstance(kept, Tensor) else self._get(kept)

        return saved_tensors_hooks(pack, unpack)

    def _get(self, number: int) -> Tensor:
        wanted = self._layers[number][0]
        wanted.prefetch()
        for before in self._layers[number - 1] if number else ():
            if not before.was_used:
                before.prefetch()
        return wanted.get()


class _Offloaded:
    """Rows of one layer on the host, and a copy on the device while the backward pass needs it."""

    def __init__(self, rows: Tensor) -> None:
        self._device = rows.device
        cuda = rows.is_cuda
        self._host = host_buffer(rows)
        self._arrived: tuple[Tensor, torch.cuda.Event | None] | None = None
        self.was_used = False  # then no backward pass needs it, except a second one over the same graph
        if not cuda:
            self._host.copy_(rows)
            return
        side = _side_stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            self._host.copy_(rows, non_blocking=True)
        rows.record_stream(side)

    def prefetch(self) -> None:
        """Start the copy to the device, if it has not started."""
        if self._arrived is not None:
            return
        # Allocated in the main stream, so the copy waits for what was queued there before: the memory's last user too.
        rows = torch.empty_like(self._host, device=self._device)
        if self._device.type != "cuda":
            self._arrived = rows.copy_(self._host), None
            return
        side = _side_stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            rows.copy_(self._host, non_blocking=True)
            self._arrived = rows, side.record_event()
        rows.record_stream(side)

    def get(self) -> Tensor:
        """The rows; the device waits for them, the host does not."""
        assert self._arrived is not None
        rows, event = self._arrived
        self._arrived, self.was_used = None, True
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
        return rows


def host_buffer(rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor on the host for ``rows``, or for as many values of another ``dtype``.

    Page-locked if ``rows`` are on a GPU: the GPU then copies without the host's help.
    """
    return torch.empty(rows.shape, dtype=dtype or rows.dtype, device="cpu", pin_memory=rows.is_cuda)


def buffer_bytes(num_bytes: int, device: torch.device) -> int:
    """Bytes of the host that a ``host_buffer`` takes: torch rounds page-locked ones up to a power of two.

    >>> [buffer_bytes(size, torch.device("cuda")) for size in (5, 8, 9)], buffer_bytes(5, torch.device("cpu"))
    ([8, 8, 16], 5)
    """
    return 1 << (num_bytes - 1).bit_length() if device.type == "cuda" else num_bytes


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _SIDE_STREAMS:
        _SIDE_STREAMS[device] = torch.cuda.Stream(device)
    return _SIDE_STREAMS[device]
