"""AdamW whose two means wait in the host's memory between updates, so that activations may use the GPU's.

They cross the link in pieces, each way on a stream of its own: pieces to come are fetched while others are updated,
and those before them leave. The host waits for none of it. The arithmetic is torch's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from vl3train.engine.host_piece import Piece, Room
from vl3train.engine.rounded_adamw import MEANS
from vl3train.model import offload

PIECE_VALUES = 32 * 2**20
"""Of a parameter, and of each of its means: 256 MiB for both, 5 ms of a link of 54 GB/s (benchmarks/log.md)."""
FETCHED_AHEAD = 2
"""Pieces on their way in while one is updated: with one alone the link would stand idle from its arrival to its
update."""


class HostAdamW(torch.optim.AdamW):
    """torch.optim.AdamW but for where its means lie: on the host, page-locked where the parameters are on a GPU.

    A subclass so that param_groups and checkpoints are those of AdamW: a run may go on with the other.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], eps: float, fused: bool
    ) -> None:
        """``groups`` as torch.optim.AdamW takes them."""
        super().__init__(list(groups), betas=betas, eps=eps, fused=fused)
        # Of parameters that have a state, in the order of updates.
        self._pieces: dict[Tensor, list[Piece]] = {}
        self._leaving: list[Piece] = []  # of the newest step, in the order in which they leave

    def num_bytes(self) -> int:
        """Of all means."""
        parameters = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        return sum(2 * parameter.nbytes for parameter in parameters)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "nothing here evaluates the loss again"
        updated = [
            (group, parameter)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        due = [(group, piece) for group, parameter in updated for piece in self._pieces_of(parameter, group)]
        # The host is far ahead of the copies and cannot get back memory that they still read: fetching waits for it on
        # the device. Rooms that nobody will need go at once: torch gives memory out again when all that was queued by
        # then is done, which for the last ones is not before every mean has left.
        sent: list[Room] = []
        to_fetch = sum(not piece.is_there for _, piece in due)
        for number, (group, piece) in enumerate(due):
            for _, near in due[number : number + 1 + FETCHED_AHEAD]:
                to_fetch -= not near.is_there
                near.fetch(sent)
            piece.update(group, self.state[piece.parameter]["step"])
            room = piece.send()
            if len(sent) < to_fetch:
                sent.append(room)
            del room
        for _, parameter in updated:
            self.state[parameter]["step"] += 1
        for piece in self._all_pieces():
            piece.drop()  # was brought for a parameter that got no gradient
        self._leaving = [piece for _, piece in due]

    @torch.no_grad()
    def bring(self, max_bytes: int) -> None:
        """Start fetching what the next step updates first, as far as ``max_bytes`` of the device allow."""
        for piece in self._all_pieces():
            if piece.is_there:
                continue
            max_bytes -= piece.num_bytes
            if max_bytes < 0:
                return
            piece.fetch([])

    def wait(self, max_bytes_left: int = 0) -> None:
        """Block the host until no more than that many bytes of the means are still on their way out."""
        behind = 0
        for position in reversed(range(len(self._leaving))):
            behind += self._leaving[position].num_bytes
            if behind > max_bytes_left:
                self._leaving[position].wait()
                del self._leaving[: position + 1]  # they leave in their order
                return

    def state_dict(self) -> dict[str, Any]:
        """As torch's, once the means have arrived on the host."""
        self.wait()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would lay the means where their parameter is."""
        for piece in self._all_pieces():
            piece.wait()
        saved = state_dict["state"]
        old = dict(self.state)
        steps = {number: {"step": state["step"]} for number, state in saved.items()}
        super().load_state_dict({**state_dict, "state": steps})
        numbers, parameters = (
            list(itertools.chain.from_iterable(group["params"] for group in groups))
            for groups in (state_dict["param_groups"], self.param_groups)
        )
        self._pieces, self._leaving = {}, []
        for number, parameter in zip(numbers, parameters, strict=True):
            if number not in saved:
                continue
            for name in MEANS:
                there = old.get(parameter, {}).get(name)
                host = offload.host_buffer(parameter) if there is None else there
                self.state[parameter][name] = host.copy_(saved[number][name])
            self._pieces[parameter] = self._split(parameter)

    def _pieces_of(self, parameter: Tensor, group: dict[str, Any]) -> list[Piece]:
        if parameter not in self._pieces:
            # As torch makes them in the first step.
            device = parameter.device if group["fused"] else "cpu"
            self.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for name in MEANS:
                self.state[parameter][name] = offload.host_buffer(parameter).zero_()
            self._pieces[parameter] = self._split(parameter)
        return self._pieces[parameter]

    def _split(self, parameter: Tensor) -> list[Piece]:
        means = [self.state[parameter][name].view(-1) for name in MEANS]
        starts = range(0, parameter.numel(), PIECE_VALUES)
        return [
            Piece(
                parameter,
                slice(start, start + PIECE_VALUES),
                [m[start : start + PIECE_VALUES] for m in means],
            )
            for start in starts
        ]

    def _all_pieces(self) -> Iterable[Piece]:
        return itertools.chain.from_iterable(self._pieces.values())
