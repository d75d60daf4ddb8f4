"""One chunk of what engine/optim/offload_adamw.py updates: its copy to the device, its update, its copy back."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from vl3train.engine.optim.split_masters import join, split


@dataclass(eq=False, slots=True)
class DeviceBuffer:
    """Device memory for the moments of one chunk: two tensors, because small ones fit better between activations."""

    moments: tuple[Tensor, ...]  # two of (values,)
    free: torch.cuda.Event | None = None  # when they have been copied to the host; None while they are in use


class Chunk:
    """A range of one parameter. Its moments are on the host, and on the device around its update."""

    def __init__(
        self, parameter: Tensor, values: slice, host: Sequence[Tensor], low_bits: Tensor | None
    ) -> None:
        """``host`` has the moments of this range, ``low_bits`` its lower bits where masters are split, else None."""
        self.parameter = parameter
        self.num_bytes = sum(moment.nbytes for moment in host)
        self._values, self._host, self._low_bits = values, host, low_bits
        self._buffer: DeviceBuffer | None = None  # with the moments, or waiting for their copy
        self._arrived: torch.cuda.Event | None = None  # on the device
        self._left: torch.cuda.Event | None = None  # to the host, complete

    @property
    def is_on_device(self) -> bool:
        """Whether its moments are on the device, or on their way there."""
        return self._buffer is not None

    def fetch(self, reusable: list[DeviceBuffer]) -> None:
        """Start the copy to the device, if it has not started.

        It goes into the first buffer of ``reusable`` that is large enough, which is removed there, or into a new one.
        """
        if self._buffer is not None:
            return
        device, size = self.parameter.device, self._host[0].numel()
        self._buffer = next((buffer for buffer in reusable if buffer.moments[0].numel() >= size), None)
        if self._buffer is None:
            # Allocated in the main stream, so the copy waits for what was queued there: the memory's last user too.
            self._buffer = DeviceBuffer(
                tuple(torch.empty_like(moment, device=device) for moment in self._host)
            )
        else:
            reusable.remove(self._buffer)
        # The moments of the step before may still be on their way to the host.
        waits = [event for event in (self._left, self._buffer.free) if event is not None]
        self._arrived = _copy(self._host, self._moments(), _streams(device)[0], after=waits)

    def update(self, group: dict[str, Any], step: Tensor, found_inf: Tensor | None = None) -> None:
        """torch's AdamW on this range; ``step`` (0-d) counts the updates before this one.

        Where ``found_inf`` (0-d) is 1, it changes nothing.
        """
        assert self.parameter.grad is not None, "only parameters with a gradient are updated"
        if self._arrived is not None:
            torch.cuda.current_stream(self.parameter.device).wait_event(self._arrived)
        if not group["fused"]:
            if found_inf is not None and found_inf > 0:  # on the CPU: only the fused kernel takes it
                return
            found_inf = None
        exp_avg, exp_avg_sq = self._moments()
        beta1, beta2 = group["betas"]
        weight = self.parameter.detach().view(-1)[self._values]
        master = weight if self._low_bits is None else join(weight, self._low_bits)
        adamw(
            [master],
            [self.parameter.grad.view(-1)[self._values]],
            [exp_avg],
            [exp_avg_sq],
            [],
            [step.clone()],  # each call increments it
            foreach=False,
            fused=bool(group["fused"]),
            found_inf=found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if self._low_bits is not None:
            split(master, weight, self._low_bits)

    def offload(self) -> DeviceBuffer:
        """Start the copy to the host, behind the update. The buffer is free when it has ended."""
        self._left = _copy(self._moments(), self._host, _streams(self.parameter.device)[1])
        buffer, self._buffer = self._buffer, None
        assert buffer is not None, "it has the moments"
        buffer.free = self._left
        return buffer

    def drop(self) -> None:
        """Free the device's copy of moments that no update has changed."""
        self._buffer = None

    def wait_until_left(self) -> None:
        """Block the host until the moments are in its memory, as the newest update left them.

        It does not wait for a later copy to the device: while the host waits, it queues no work.
        """
        if self._left is not None and not self._left.query():
            self._left.synchronize()

    def wait(self) -> None:
        """Block the host until no copy of the moments is in progress."""
        self.wait_until_left()
        if self._arrived is not None and not self._arrived.query():
            self._arrived.synchronize()

    def _moments(self) -> tuple[Tensor, ...]:
        assert self._buffer is not None, "fetched before"
        return tuple(moment[: self._host[0].numel()] for moment in self._buffer.moments)


@functools.cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream] | tuple[None, None]:
    """One stream for each direction, so that the link carries both at once: to the device, to the host."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


def _copy(
    sources: Sequence[Tensor],
    targets: Sequence[Tensor],
    stream: torch.cuda.Stream | None,
    after: Sequence[torch.cuda.Event] = (),
) -> torch.cuda.Event | None:
    """Queue copies on ``stream``, behind all work of the main stream and ``after``. Returns the event of their end."""
    if stream is None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
        return None
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    for event in after:
        stream.wait_event(event)
    with torch.cuda.stream(stream):
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source, non_blocking=True)
    for tensor in (*sources, *targets):
        if tensor.is_cuda:
            tensor.record_stream(stream)  # torch reuses its memory only after the copy
    return stream.record_event()
