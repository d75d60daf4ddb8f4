"""AdamW that changes nothing in a step that the device found bad.

The host queues the update long before the device knows the step's loss and norm. So the flag is a tensor: the fused
kernel of torch reads it (its gradient scaler uses that), writes nothing where it is 1, and takes back its count of
steps. On the CPU torch has no such kernel, and reading the flag waits for nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

update: Callable[[torch.optim.AdamW], object] = inspect.unwrap(torch.optim.AdamW.step)
"""torch's own step, without what asks torch's compiler for a break in its graph, and so imports it."""


class SkippingAdamW(torch.optim.AdamW):
    """torch.optim.AdamW with a flag that turns a step off."""

    found_inf: Tensor | None = None
    """0-d float32 on the parameters' device: 1 where the next ``step`` must change nothing, else 0. torch's name."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient, or none."""
        assert closure is None, "this optimizer does not evaluate the loss again"
        flag = self.found_inf
        if flag is None or flag.is_cuda:
            update(self)
            return
        if flag > 0:
            for group in self.param_groups:  # DeepSpeed looks for the state after the first step
                self._init_group(group, [], [], [], [], [], [])
            return
        self.found_inf = None  # torch refuses it beside a kernel that is not fused
        try:
            update(self)
        finally:
            self.found_inf = flag
