"""What crosses between host and device beside the computing: the next micro-batch, and what a step reports."""

from __future__ import annotations

import torch
from torch import Tensor

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


class Reading:
    """A few values of the device on their way to the host.

    Started before an update is queued they are there before it is done: the host queues the next step meanwhile, and
    they do not stand behind AdamW's means, where those leave for the host (a GPU copies one way in the order asked).
    """

    def __init__(self, values: Tensor) -> None:
        """``values`` (n,), of any device; the copy is queued behind what they are computed from."""
        self._values, self._done = values, None
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._done = torch.cuda.current_stream(values.device).record_event()

    def wait(self) -> list[float]:
        """The values; blocks the host until they are there."""
        if self._done is not None:
            self._done.synchronize()
        return self._values.tolist()
