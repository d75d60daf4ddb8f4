"""When offloaded optimizer state (engine/optim/offload_adamw.py) may be on the device beside activations.

It leaves the device while the first micro-batch of a step runs forward, and comes back while the last one runs
backward. These two micro-batches keep fewer activations, by what the link cannot carry in that time.
"""

from __future__ import annotations

from collections.abc import Iterator

from vl3train.contracts.records import Batch
from vl3train.engine.optim.offload_adamw import OffloadAdamW
from vl3train.model.activations.budget import WORK_A_CROSSING, ActivationBudget
from vl3train.model.activations.work import pack_size

LEFT_IN_UPDATE = 0.1
"""Share of the moments that has left when the update ends: a fifth in a trace of the 7B, where the link was idle
before; less where the update is short compared to them (benchmarks/log.md)."""
SCATTERED = 0.05
"""Share of the moments' bytes that stays free beside activations, because their buffers lie in holes of all sizes.
Without it the 7B on an H200 ran out of memory 12 times in a few dry runs and eight steps, and each time torch mapped
its memory anew."""


class OffloadSchedule:
    """Says when the moments of one engine come to the device, and when the host waits for those that leave."""

    def __init__(self, optimizer: OffloadAdamW) -> None:
        """``optimizer`` holds the moments."""
        self.optimizer = optimizer
        self.budget: ActivationBudget | None = None
        """Set by engine/memory/fit.py. Without it, moments come only when the update asks for them."""
        # Free bytes beside each layer still to run: in a step's first forward pass, and in its last backward pass.
        self._room_forward: Iterator[int] = iter(())
        self._room_backward: Iterator[int] = iter(())

    def reserved_bytes(self, batch: Batch, *, first: bool, last: bool) -> int:
        """Bytes of the budget that a micro-batch leaves to moments in transit, by its place in the step.

        Computed from integers alone, so that a resumed run makes the same plans and is the same to the last bit.
        """
        if self.budget is None or not (first or last):
            return 0
        size = pack_size(batch)
        # In the first: what is still on the device when its forward pass ends; none comes early while others leave. In
        # the last: what must be on the device before its backward pass begins.
        rates, moments = self.budget.rates, self.optimizer.num_bytes()
        carried = (rates.forward(size) if first else rates.backward(size)) // WORK_A_CROSSING
        return max(0, moments - carried - int(LEFT_IN_UPDATE * moments) * first)

    def scattered(self) -> int:
        """Bytes that stay free: no budget gives them to activations."""
        return int(SCATTERED * self.optimizer.num_bytes())

    def begin_forward(self, batch: Batch, reserved_bytes: int, *, first: bool, last: bool) -> None:
        """Before the forward pass of a step's first micro-batch, and of its last."""
        if self.budget is None:
            return
        size = pack_size(batch)
        room = self.budget.room_beside(size, self.budget.plan(size, reserved_bytes=reserved_bytes))
        self._room_forward = iter(room if first else ())
        self._room_backward = reversed(room[:-1] if last else ())
        if last and not first:  # in the first, moments leave
            self._prefetch(room[-1])

    def before_layer(self) -> None:
        """Call it before each layer: in a step's first forward pass the host waits for moments until the layer fits."""
        room = next(self._room_forward, None)
        if room is not None:
            self.optimizer.wait(max_bytes_left=room)

    def after_layer_backward(self) -> None:
        """Call it in each backward pass: in a step's last one, moments come into the memory that layers free."""
        room = next(self._room_backward, None)
        if room is not None:
            self._prefetch(room)

    def _prefetch(self, room: int) -> None:
        # Memory of moments that leave is free only when their copy has ended, and the host runs ahead of that. After a
        # few micro-batches in between, all have left and this does not wait.
        self.optimizer.wait()
        self.optimizer.prefetch(room)
