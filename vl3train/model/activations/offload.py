"""Rows that wait in the host's memory between the forward and the backward pass.

Sent to the host on a stream of its own while layers go on computing, they are fetched one layer ahead in the backward
pass, so that neither pass waits for more than the first transfer where the link keeps up.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_SIDE_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


class HostRows:
    """What one tower's layers sent to the host in one forward pass, in the order of the layers."""

    def __init__(self) -> None:
        self._layers: list[list[_Sent]] = []

    def keep_input(self, rows: Tensor) -> AbstractContextManager[object]:
        """Within it, ``rows`` go to the host where autograd would keep them; everything else stays where it is.

        The same bits come back in the backward pass. ``rows`` themselves are freed with their last other user.
        """
        address, shape = rows.data_ptr(), rows.shape  # not the rows: the hooks outlive the forward pass
        number = len(self._layers)
        layer: list[_Sent] = []  # one at most: rows may be kept for two operations
        self._layers.append(layer)

        def pack(tensor: Tensor) -> Tensor | int:
            if tensor.data_ptr() != address or tensor.shape != shape:
                return tensor
            if not layer:
                layer.append(_Sent(tensor.detach()))
            return number

        def unpack(kept: Tensor | int) -> Tensor:
            return kept if isinstance(kept, Tensor) else self._take(kept)

        return saved_tensors_hooks(pack, unpack)

    def _take(self, number: int) -> Tensor:
        wanted = self._layers[number][0]
        wanted.fetch()
        for sent in self._layers[number - 1] if number else ():
            if not sent.was_taken:
                sent.fetch()
        return wanted.take()


class _Sent:
    """Rows of one layer: on the host, and for a while on the device again."""

    def __init__(self, rows: Tensor) -> None:
        self._device = rows.device
        cuda = rows.is_cuda
        self._host = host_buffer(rows)
        self._arrived: tuple[Tensor, torch.cuda.Event | None] | None = None
        self.was_taken = False  # nobody waits for it then, unless it is asked for again
        if not cuda:
            self._host.copy_(rows)
            return
        side = _side_stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            self._host.copy_(rows, non_blocking=True)
        rows.record_stream(side)

    def fetch(self) -> None:
        """Start the way back, if it has not begun."""
        if self._arrived is not None:
            return
        # Memory of the main stream: the copy waits for what was queued there before, and so for its last user.
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

    def take(self) -> Tensor:
        """The rows; the device waits for them, the host does not."""
        assert self._arrived is not None
        rows, event = self._arrived
        self._arrived, self.was_taken = None, True
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
        return rows


def host_buffer(rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Room on the host for ``rows``, or for as many values of another ``dtype``; page-locked where a GPU is to copy
    without the host's help."""
    return torch.empty(rows.shape, dtype=dtype or rows.dtype, device="cpu", pin_memory=rows.is_cuda)


def buffer_bytes(num_bytes: int, device: torch.device) -> int:
    """What a ``host_buffer`` of that size takes of the host: torch rounds page-locked ones up to a power of two.

    >>> [buffer_bytes(size, torch.device("cuda")) for size in (5, 8, 9)], buffer_bytes(5, torch.device("cpu"))
    ([8, 8, 16], 5)
    """
    return 1 << (num_bytes - 1).bit_length() if device.type == "cuda" else num_bytes


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _SIDE_STREAMS:
        _SIDE_STREAMS[device] = torch.cuda.Stream(device)
    return _SIDE_STREAMS[device]
