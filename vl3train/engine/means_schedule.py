"""When AdamW's means that wait on the host (engine/host_adamw.py) may be on the device beside activations.

They leave it while the first micro-batch of a step runs forward, and come back while the last one runs backward.
Those two keep less of their activations by what the link cannot carry in that time.
"""

from __future__ import annotations

from collections.abc import Iterator

from vl3train.contracts.records import Batch
from vl3train.engine.device_memory import DeviceMemory
from vl3train.engine.host_adamw import HostAdamW
from vl3train.model.activation_budget import WORK_A_CROSSING, ActivationBudget
from vl3train.model.recomputation import pack_size

LEFT_IN_UPDATE = 0.1
"""Share of the means that has left when the update ends: a fifth in a trace of the 7B, where the link was idle before;
less where the update is shorter beside them (benchmarks/log.md)."""
SCATTERED = 0.05
"""Share of the means' bytes that stays free beside activations, since their rooms lie in holes of all sizes. With none
of it the 7B on an H200 ran out of memory 12 times in a few dry runs and eight steps, and torch mapped its memory anew
each time."""


class MeansSchedule:
    """Tells the means of one engine when to come, and the host when to wait for those that leave."""

    def __init__(self, optimizer: HostAdamW, memory: DeviceMemory | None) -> None:
        """``memory`` counts the device's; None brings no means before the update asks for them."""
        self.optimizer, self.memory = optimizer, memory
        self.budget: ActivationBudget | None = None
        """Set by engine/memory.py. Without one, layers keep what they always keep, and nobody waits."""
        self._room: Iterator[int] = iter(())  # beside each layer to come of a step's first forward pass
        self._most_held = 0  # while the last backward pass of a step runs

    def others(self, batch: Batch, *, first: bool, last: bool) -> int:
        """Bytes of the budget that a micro-batch leaves to means on their way, by its place in the step.

        From integers alone, so that a run that is resumed computes the same again, to the last bit.
        """
        if self.budget is None or not (first or last):
            return 0
        size = pack_size(batch)
        # In the first, what is still there when its forward pass ends; none comes early while others leave. In the
        # last, what must be there before its backward pass begins.
        rates, means = self.budget.rates, self.optimizer.num_bytes()
        carried = (rates.forward(size) if first else rates.backward(size)) // WORK_A_CROSSING
        return max(0, means - carried - int(LEFT_IN_UPDATE * means) * first)

    def scattered(self) -> int:
        """Bytes that no budget may give to activations."""
        return int(SCATTERED * self.optimizer.num_bytes())

    def begin_forward(self, batch: Batch, others: int, *, first: bool) -> None:
        """Before the forward pass of a step's first micro-batch, and of its last."""
        if self.budget is None:
            return
        size = pack_size(batch)
        room = self.budget.room_beside(size, self.budget.levels(size, others=others))
        if first:
            self._room = iter(room)
        else:
            self.optimizer.bring(room[-1])

    def before_layer(self) -> None:
        """In each forward pass; in a step's first the host waits until the layer has room beside means that leave."""
        room = next(self._room, None)
        if room is not None:
            self.optimizer.wait(max_bytes_left=room)

    def begin_backward(self, *, last: bool) -> None:
        """Before the backward pass of each micro-batch."""
        self._most_held = self.memory.held() if last and self.memory is not None else 0

    def after_layer_backward(self) -> None:
        """In each backward pass; in a step's last one means come into the memory that layers free."""
        if self._most_held:
            assert self.memory is not None, "it has counted what was held"
            self.optimizer.bring(self._most_held - self.memory.held())

    def end_backward(self) -> None:
        """After the backward pass of each micro-batch."""
        self._most_held = 0
