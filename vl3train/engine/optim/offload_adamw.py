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

from vl3train.engine.optim.offload_chunk import Piece, Room
from vl3train.engine.optim.split_masters import LOW_BITS, split
from vl3train.engine.optim.stochastic_adamw import MOMENTS
from vl3train.engine.ranks import RunError
from vl3train.model.activations import offload

PIECE_VALUES = 32 * 2**20
"""Of a parameter, and of each of its means: 256 MiB for both, 5 ms of a link of 54 GB/s (benchmarks/log.md)."""
FETCHED_AHEAD = 2
"""Pieces on their way in while one is updated: with one alone the link would stand idle from its arrival to its
update."""


class OffloadAdamW(torch.optim.AdamW):
    """torch.optim.AdamW but for where its means lie: on the host, page-locked where the parameters are on a GPU.

    A subclass so that param_groups and checkpoints are those of AdamW: a run may go on with the other, unless it keeps
    the lower bits of masters.
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
        return sum(len(MOMENTS) * 4 * parameter.numel() for parameter in parameters)

    def host_bytes_to_come(self) -> int:
        """What means that no step has made yet will take of the host, in one buffer for each parameter and mean."""
        return sum(
            len(MOMENTS) * offload.buffer_bytes(4 * parameter.numel(), parameter.device)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter not in self._pieces
        )

    @torch.no_grad()
    def keep_low_bits(self, parameter: Tensor, weight: Tensor) -> None:
        """Of ``parameter`` (n,) float32 keep beside ``weight`` (n,) bfloat16 only the bits that this lacks.

        The weight gets the rounded values; the caller makes it the data of ``parameter``. Before the first step.
        """
        assert parameter not in self._pieces, "pieces would not know of the lower bits"
        low = torch.empty_like(weight, dtype=torch.int16)
        for start in range(0, parameter.numel(), PIECE_VALUES):
            values = slice(start, start + PIECE_VALUES)
            split(parameter[values], weight[values], low[values])
        self.state[parameter][LOW_BITS] = low

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
        """Start fetching what the next step updates first, until ``max_bytes`` of the means are on the device."""
        for piece in self._all_pieces():
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
                self._leaving[position].wait_until_left()
                del self._leaving[: position + 1]  # they leave in their order
                return

    def state_dict(self) -> dict[str, Any]:
        """As torch's, once the means have arrived on the host."""
        self.wait()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would lay the means where their parameter is, and make low bits floating point numbers.

        RunError where masters are split in one of both only: they would lose their lower bits, or get others'.
        """
        for piece in self._all_pieces():
            piece.wait()
        saved = state_dict["state"]
        old = dict(self.state)
        numbers, parameters = (
            list(itertools.chain.from_iterable(group["params"] for group in groups))
            for groups in (state_dict["param_groups"], self.param_groups)
        )
        for number, parameter in zip(numbers, parameters, strict=True):
            if (LOW_BITS in saved.get(number, {})) != (LOW_BITS in old.get(parameter, {})):
                raise RunError(
                    "masters are split either in the checkpoint or in this run, not in both: set optim.master_dtype as "
                    "it was, or start a new run from the checkpoint's weights"
                )
        steps = {number: {"step": state["step"]} for number, state in saved.items() if "step" in state}
        super().load_state_dict({**state_dict, "state": steps})
        self._pieces, self._leaving = {}, []
        for number, parameter in zip(numbers, parameters, strict=True):
            before, state = old.get(parameter, {}), saved.get(number, {})
            if LOW_BITS in state:
                self.state[parameter][LOW_BITS] = before[LOW_BITS].copy_(state[LOW_BITS])
            if "step" not in state:  # no update yet
                continue
            for name in MOMENTS:
                host = before[name] if name in before else offload.host_buffer(parameter, torch.float32)
                self.state[parameter][name] = host.copy_(state[name])
            self._pieces[parameter] = self._split(parameter)

    def _pieces_of(self, parameter: Tensor, group: dict[str, Any]) -> list[Piece]:
        if parameter not in self._pieces:
            # As torch makes them in the first step.
            device = parameter.device if group["fused"] else "cpu"
            self.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for name in MOMENTS:
                self.state[parameter][name] = offload.host_buffer(parameter, torch.float32).zero_()
            self._pieces[parameter] = self._split(parameter)
        return self._pieces[parameter]

    def _split(self, parameter: Tensor) -> list[Piece]:
        state = self.state[parameter]
        pieces = []
        for start in range(0, parameter.numel(), PIECE_VALUES):
            values = slice(start, start + PIECE_VALUES)
            moments = [state[name].view(-1)[values] for name in MOMENTS]
            low_bits = state[LOW_BITS][values] if LOW_BITS in state else None
            pieces.append(Piece(parameter, values, moments, low_bits))
        return pieces

    def _all_pieces(self) -> Iterable[Piece]:
        return itertools.chain.from_iterable(self._pieces.values())
