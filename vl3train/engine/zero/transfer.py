"""Copies between host and device while the device computes: the next micro-batch, and what a step reports."""

from __future__ import annotations

import torch
from torch import Tensor

from vl3train.contracts.records import Batch


class Transfer:
    """Copies micro-batches to one device, one at a time; on a GPU in a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._prefetched: tuple[Batch, Batch, torch.cuda.Event | None] | None = None

    def prefetch(self, batch: Batch) -> None:
        """Start copying ``batch``; from page-locked memory the host does not wait for it."""
        if self._stream is None:
            self._prefetched = batch, batch.to(self._device), None
            return
        with torch.cuda.stream(self._stream):
            self._prefetched = batch, batch.to(self._device), self._stream.record_event()

    def get(self, batch: Batch) -> Batch:
        """``batch`` on the device: the prefetched copy, if it is of this batch, or a copy made now."""
        prefetched, self._prefetched = self._prefetched, None
        if prefetched is None or prefetched[0] is not batch:
            return batch.to(self._device)
        _, arrived, event = prefetched
        if event is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(event)
            for tensor in arrived.tensors().values():
                tensor.record_stream(computing)  # its memory was allocated in the other stream
        return arrived


class Reading:
    """A few values of the device that are being copied to the host.

    A copy that starts before the update is queued ends before the update does, and the host queues the next step
    meanwhile. Otherwise small copies would queue behind the optimizer state that leaves for the host: a GPU copies each
    way in the order in which it was asked.
    """

    def __init__(self, values: Tensor) -> None:
        """``values`` (n,), on any device; the copy starts when they are computed."""
        self._values, self._done = values, None
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._done = torch.cuda.current_stream(values.device).record_event()

    def wait(self) -> list[float]:
        """The values; blocks the host until they have arrived."""
        if self._done is not None:
            self._done.synchronize()
        return self._values.tolist()
