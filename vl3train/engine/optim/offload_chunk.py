"""One piece of what engine/optim/offload_adamw.py updates: its way to the device, the update, its way back."""

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
class Room:
    """Memory of the device for the means of one piece: two tensors, since small ones fit between activations better."""

    moments: tuple[Tensor, ...]  # two of (values,)
    free: torch.cuda.Event | None = None  # when they have been copied to the host; None while they are needed


class Piece:
    """A range of one parameter. Its means are on the host, and for a while on the device."""

    def __init__(
        self, parameter: Tensor, values: slice, host: Sequence[Tensor], low_bits: Tensor | None
    ) -> None:
        """``host`` and ``low_bits`` are of the range alone; these where masters are split (split_masters.py)."""
        self.parameter = parameter
        self.num_bytes = sum(mean.nbytes for mean in host)
        self._values, self._host, self._low_bits = values, host, low_bits
        self._room: Room | None = None  # with the means, or with those on their way there
        self._arrived: torch.cuda.Event | None = None
        self._left: torch.cuda.Event | None = None

    @property
    def is_there(self) -> bool:
        """Whether the device has room for its means, and they are there or on their way."""
        return self._room is not None

    def fetch(self, sent: list[Room]) -> None:
        """Start the way in, if it has not begun, into the first large enough room of ``sent`` or a new one."""
        if self._room is not None:
            return
        device, size = self.parameter.device, self._host[0].numel()
        self._room = next((room for room in sent if room.moments[0].numel() >= size), None)
        if self._room is None:
            # Memory of the main stream: the copy waits for what was queued there before, and so for its last user.
            self._room = Room(tuple(torch.empty_like(mean, device=device) for mean in self._host))
        else:
            sent.remove(self._room)
        # The means of the step before may still be leaving too.
        waits = [event for event in (self._left, self._room.free) if event is not None]
        self._arrived = _copy(self._host, self._moments(), _streams(device)[0], after=waits)

    def update(self, group: dict[str, Any], step: Tensor) -> None:
        """torch's AdamW on this range; ``step`` counts the updates before this one."""
        assert self.parameter.grad is not None, "only parameters with a gradient are updated"
        if self._arrived is not None:
            torch.cuda.current_stream(self.parameter.device).wait_event(self._arrived)
        mean, square = self._moments()
        beta1, beta2 = group["betas"]
        weight = self.parameter.detach().view(-1)[self._values]
        master = weight if self._low_bits is None else join(weight, self._low_bits)
        adamw(
            [master],
            [self.parameter.grad.view(-1)[self._values]],
            [mean],
            [square],
            [],
            [step.clone()],  # torch counts it up with each call
            foreach=False,
            fused=bool(group["fused"]),
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

    def send(self) -> Room:
        """Start the way out, behind the update; the room is free once they have left."""
        self._left = _copy(self._moments(), self._host, _streams(self.parameter.device)[1])
        room, self._room = self._room, None
        assert room is not None, "the means are in it"
        room.free = self._left
        return room

    def drop(self) -> None:
        """Let go of means that nothing has changed since they were fetched."""
        self._room = None

    def wait_until_left(self) -> None:
        """Block the host until the means are in its memory, as the newest update left them.

        Not until they have come again, where that was asked for since: a host that waits has nothing queued behind.
        """
        if self._left is not None and not self._left.query():
            self._left.synchronize()

    def wait(self) -> None:
        """Block the host until no copy of the means is on its way."""
        self.wait_until_left()
        if self._arrived is not None and not self._arrived.query():
            self._arrived.synchronize()

    def _moments(self) -> tuple[Tensor, ...]:
        assert self._room is not None, "fetched before"
        return tuple(mean[: self._host[0].numel()] for mean in self._room.moments)


@functools.cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream] | tuple[None, None]:
    """One for each direction, so that the link carries both at once."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


def _copy(
    sources: Sequence[Tensor],
    targets: Sequence[Tensor],
    stream: torch.cuda.Stream | None,
    after: Sequence[torch.cuda.Event] = (),
) -> torch.cuda.Event | None:
    """Queue copies on ``stream`` behind all that the main stream has been given; the event tells their end."""
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
            tensor.record_stream(stream)  # its memory is given out again once the copy is done
    return stream.record_event()
