"""AdamW whose two moments are offloaded to the host's memory between updates, so that activations may use the GPU's.

They cross the link in chunks, with one stream for each direction: while one chunk is updated, the next ones come and
the ones before leave. The host does not wait. The arithmetic is torch's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from vl3train.engine.optim.offload_chunk import Chunk, DeviceBuffer
from vl3train.engine.optim.skipping_adamw import SkippingAdamW
from vl3train.engine.optim.split_masters import LOW_BITS, split
from vl3train.engine.optim.stochastic_adamw import MOMENTS
from vl3train.engine.ranks import RunError
from vl3train.model.activations import offload

CHUNK_VALUES = 32 * 2**20
"""Values of a parameter and of each moment: 256 MiB for both moments, 5 ms of a link of 54 GB/s (benchmarks/log.md)."""
FETCHED_AHEAD = 2
"""Chunks on their way in while one is updated. With only one, the link would be idle from its arrival to its update."""


class OffloadAdamW(SkippingAdamW):
    """torch.optim.AdamW with its moments on the host, in page-locked memory where the parameters are on a GPU.

    It is a subclass, so param_groups and checkpoints are those of AdamW: a run may resume with either, unless it keeps
    the lower bits of masters.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], eps: float, fused: bool
    ) -> None:
        """``groups`` as torch.optim.AdamW takes them."""
        super().__init__(list(groups), betas=betas, eps=eps, fused=fused)
        # Of parameters that have optimizer state, in the order of updates.
        self._chunks: dict[Tensor, list[Chunk]] = {}
        self._leaving: list[Chunk] = []  # of the newest step, in the order in which they leave

    def num_bytes(self) -> int:
        """Bytes of all moments."""
        parameters = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        return sum(len(MOMENTS) * 4 * parameter.numel() for parameter in parameters)

    def host_bytes_to_come(self) -> int:
        """Bytes of the host that moments not created yet will take, in one buffer for each parameter and moment."""
        return sum(
            len(MOMENTS) * offload.buffer_bytes(4 * parameter.numel(), parameter.device)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter not in self._chunks
        )

    @torch.no_grad()
    def keep_low_bits(self, parameter: Tensor, weight: Tensor) -> None:
        """Split ``parameter`` (n,) float32 into ``weight`` (n,) bfloat16 and the bits that this lacks, which are kept.

        The weight gets the rounded values; the caller makes it the data of ``parameter``. Call before the first step.
        """
        assert parameter not in self._chunks, "chunks made before would not have the lower bits"
        low = torch.empty_like(weight, dtype=torch.int16)
        for start in range(0, parameter.numel(), CHUNK_VALUES):
            values = slice(start, start + CHUNK_VALUES)
            split(parameter[values], weight[values], low[values])
        self.state[parameter][LOW_BITS] = low

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient, or none where ``found_inf`` is 1."""
        assert closure is None, "this optimizer does not reevaluate the loss"
        updated = [
            (group, parameter)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        due = [(group, chunk) for group, parameter in updated for chunk in self._chunks_of(parameter, group)]
        # The host runs far ahead of the copies, and memory that they still read is not free for it. So a fetch reuses
        # the buffer of a chunk that leaves, and waits for it on the device. Buffers that no fetch will need are freed
        # at once: torch reuses memory when all work queued by then is done, and for buffers freed last that is after
        # every moment has left.
        reusable: list[DeviceBuffer] = []
        to_fetch = sum(not chunk.is_on_device for _, chunk in due)
        for number, (group, chunk) in enumerate(due):
            for _, near in due[number : number + 1 + FETCHED_AHEAD]:
                to_fetch -= not near.is_on_device
                near.fetch(reusable)
            chunk.update(group, self.state[chunk.parameter]["step"], self.found_inf)
            buffer = chunk.offload()
            if len(reusable) < to_fetch:
                reusable.append(buffer)
            del buffer
        for _, parameter in updated:
            self.state[parameter]["step"] += 1 if self.found_inf is None else 1 - self.found_inf
        for chunk in self._all_chunks():
            chunk.drop()  # was prefetched for a parameter that got no gradient
        self._leaving = [chunk for _, chunk in due]

    @torch.no_grad()
    def prefetch(self, max_bytes: int) -> None:
        """Start fetching what the next step updates first, until ``max_bytes`` of the moments are on the device."""
        for chunk in self._all_chunks():
            max_bytes -= chunk.num_bytes
            if max_bytes < 0:
                return
            chunk.fetch([])

    def wait(self, max_bytes_left: int = 0) -> None:
        """Block the host until no more than ``max_bytes_left`` of the moments are still on their way to the host."""
        behind = 0
        for position in reversed(range(len(self._leaving))):
            behind += self._leaving[position].num_bytes
            if behind > max_bytes_left:
                self._leaving[position].wait_until_left()
                del self._leaving[: position + 1]  # they leave in this order
                return

    def state_dict(self) -> dict[str, Any]:
        """As torch's, once the moments have arrived on the host."""
        self.wait()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but moments stay on the host and low bits stay integers.

        Raises RunError where masters are split either in ``state_dict`` or here, not in both: lower bits would be lost.
        """
        for chunk in self._all_chunks():
            chunk.wait()
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
        self._chunks, self._leaving = {}, []
        for number, parameter in zip(numbers, parameters, strict=True):
            before, state = old.get(parameter, {}), saved.get(number, {})
            if LOW_BITS in state:
                self.state[parameter][LOW_BITS] = before[LOW_BITS].copy_(state[LOW_BITS])
            if "step" not in state:  # no update yet
                continue
            for name in MOMENTS:
                host = before[name] if name in before else offload.host_buffer(parameter, torch.float32)
                self.state[parameter][name] = host.copy_(state[name])
            self._chunks[parameter] = self._split(parameter)

    def _chunks_of(self, parameter: Tensor, group: dict[str, Any]) -> list[Chunk]:
        if parameter not in self._chunks:
            # As torch creates it in the first step.
            device = parameter.device if group["fused"] else "cpu"
            self.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for name in MOMENTS:
                self.state[parameter][name] = offload.host_buffer(parameter, torch.float32).zero_()
            self._chunks[parameter] = self._split(parameter)
        return self._chunks[parameter]

    def _split(self, parameter: Tensor) -> list[Chunk]:
        state = self.state[parameter]
        chunks = []
        for start in range(0, parameter.numel(), CHUNK_VALUES):
            values = slice(start, start + CHUNK_VALUES)
            moments = [state[name].view(-1)[values] for name in MOMENTS]
            low_bits = state[LOW_BITS][values] if LOW_BITS in state else None
            chunks.append(Chunk(parameter, values, moments, low_bits))
        return chunks

    def _all_chunks(self) -> Iterable[Chunk]:
        return itertools.chain.from_iterable(self._chunks.values())
