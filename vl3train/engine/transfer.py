"""The next micro-batch on its way to the device while this one is computed with."""

from __future__ import annotations

import torch

from vl3train.contracts.records import Batch


class Transfer:
    """Copies to one device, on a stream of their own where it is a GPU; one micro-batch at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._sent: tuple[Batch, Batch, torch.cuda.Event | None] | None = None

    def send(self, batch: Batch) -> None:
        """Start copying ``batch``; from page-locked memory the host does not wait for it."""
        if self._stream is None:
            self._sent = batch, batch.to(self._device), None
            return
        with torch.cuda.stream(self._stream):
            self._sent = batch, batch.to(self._device), self._stream.record_event()

    def take(self, batch: Batch) -> Batch:
        """``batch`` on the device: what was sent, if it was this one, or a copy made now."""
        sent, self._sent = self._sent, None
        if sent is None or sent[0] is not batch:
            return batch.to(self._device)
        _, arrived, event = sent
        if event is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(event)
            for tensor in arrived.tensors().values():
                tensor.record_stream(computing)  # its memory belongs to the other stream
        return arrived
