"""When AdamW's means that wait on the host (engine/optim/offload_adamw.py) may be on the device beside activations.

They leave it while the first micro-batch of a step runs forward, and come back while the last one runs backward.
Those two keep less of their activations by what the link cannot carry in that time.
"""

from __future__ import annotations

from collections.abc import Iterator

from vl3train.contracts.records import Batch
from vl3train.engine.optim.offload_adamw import OffloadAdamW
from vl3train.model.activations.budget import WORK_A_CROSSING, ActivationBudget
from vl3train.model.activations.work import pack_size

LEFT_IN_UPDATE = 0.1
"""Share of the means that has left when the update ends: a fifth in a trace of the 7B, where the link was idle before;
less where the update is shorter beside them (benchmarks/log.md)."""
SCATTERED = 0.05
"""Share of the means' bytes that stays free beside activations, since their rooms lie in holes of all sizes. With none
of it the 7B on an H200 ran out of memory 12 times in a few dry runs and eight steps, and torch mapped its memory anew
each time."""


class OffloadSchedule:
    """Tells the means of one engine when to come, and the host when to wait for those that leave."""

    def __init__(self, optimizer: OffloadAdamW) -> None:
        """``optimizer`` has the means."""
        self.optimizer = optimizer
        self.budget: ActivationBudget | None = None
        """Set by engine/memory/fit.py. Without it all means come when the update asks for them."""
        # Bytes beside each layer to come: of a step's first forward pass, and of its last backward pass.
        self._room_forward: Iterator[int] = iter(())
        self._room_backward: Iterator[int] = iter(())

    def reserved_bytes(self, batch: Batch, *, first: bool, last: bool) -> int:
        """Bytes of the budget that a micro-batch leaves to means on their way, by its place in the step.

        From integers alone, so that a run that is resumed computes the same again, to the last bit.
        """
        if self.budget is None or not (first or last):
            return 0
        size = pack_size(batch)
        # In the first, what is still there when its forward pass ends; none comes early while others leave. In the
        # last, what must be there before its backward pass begins.
        rates, moments = self.budget.rates, self.optimizer.num_bytes()
        carried = (rates.forward(size) if first else rates.backward(size)) // WORK_A_CROSSING
        return max(0, moments - carried - int(LEFT_IN_UPDATE * moments) * first)

    def scattered(self) -> int:
        """Bytes that no budget may give to activations."""
        return int(SCATTERED * self.optimizer.num_bytes())

    def begin_forward(self, batch: Batch, reserved_bytes: int, *, first: bool, last: bool) -> None:
        """Before the forward pass of a step's first micro-batch, and of its last."""
        if self.budget is None:
            return
        size = pack_size(batch)
        room = self.budget.room_beside(size, self.budget.levels(size, reserved_bytes=reserved_bytes))
        self._room_forward = iter(room if first else ())
        self._room_backward = reversed(room[:-1] if last else ())
        if last and not first:  # in the first, means leave
            self._bring(room[-1])

    def before_layer(self) -> None:
        """In each forward pass; in a step's first the host waits until the layer has room beside means that leave."""
        room = next(self._room_forward, None)
        if room is not None:
            self.optimizer.wait(max_bytes_left=room)

    def after_layer_backward(self) -> None:
        """In each backward pass; in a step's last one means come into the memory that layers free."""
        room = next(self._room_backward, None)
        if room is not None:
            self._bring(room)

    def _bring(self, room: int) -> None:
        # What leaves is free when its copy is done, and the host is ahead of that. With some micro-batches in between
        # they have all left, and nobody waits.
        self.optimizer.wait()
        self.optimizer.bring(room)
