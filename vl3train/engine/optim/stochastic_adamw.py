"""AdamW whose two means are kept in bfloat16: 4 bytes a parameter in place of 8; and weights without masters.

bfloat16 keeps 8 bits of a number. The mean of squares changes by a thousandth a step (beta2 = 0.999), which rounding to
the nearest would lose, step after step: the mean would stand still at half its true value. Rounded up or down at
random, by how near each is, the mean is right on average. The same goes for weights in bfloat16 that have no float32
masters (arXiv:2010.06192, section 4): a rate of 1e-5 moves few of them by half a step. The arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vl3train.model.compiling import compiled

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What torch's AdamW calls them; DeepSpeed's checkpoints do too."""


class StochasticAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW but for how its means are kept."""

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        compile_update: bool,
    ) -> None:
        """``groups`` as torch.optim.AdamW takes them, each with ``lr`` and ``weight_decay``."""
        super().__init__(list(groups), {"lr": 1e-3, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._update = compiled(_update, enabled=compile_update)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "nothing here evaluates the loss again"
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    for name in MOMENTS:
                        state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                state["step"] += 1
                rate, corrected = group["lr"], (1 - beta2 ** state["step"]) ** 0.5
                numbers = [
                    *(beta1, beta2, group["eps"], 1 - rate * group["weight_decay"]),
                    *(corrected, rate / (1 - beta1 ** state["step"])),
                ]
                # A tensor: of a number that changes the compiler would make a program for each.
                values = torch.tensor(numbers, dtype=torch.float32)
                if parameter.is_cuda:
                    values = values.pin_memory().to(parameter.device, non_blocking=True)
                # Detached: of a Parameter the compiler takes the size as fixed.
                self._update(parameter.detach(), parameter.grad, *(state[name] for name in MOMENTS), values)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which gives the means the number format of their parameter."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in MOMENTS:
                state[name] = state[name].to(torch.bfloat16)  # what was bfloat16 loses nothing


def _update(parameter: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, values: Tensor) -> None:
    """AdamW in float32 (arXiv:1711.05101, algorithm 2), in torch's order of operations."""
    beta1, beta2, eps, decay, corrected, rate = values.unbind()
    grad = gradient.float()
    new_mean = mean.float() * beta1 + grad * (1 - beta1)
    new_square = square.float() * beta2 + grad * grad * (1 - beta2)
    new = parameter.float() * decay - rate * new_mean / (new_square.sqrt() / corrected + eps)
    parameter.copy_(new if parameter.dtype == torch.float32 else rounded_at_random(new))
    mean.copy_(rounded_at_random(new_mean))
    square.copy_(rounded_at_random(new_square))


def rounded_at_random(values: Tensor) -> Tensor:
    """float32 -> bfloat16, up or down with the odds that make it right on average.

    The lower half of a float32's bits is what bfloat16 lacks: a random number of that size, added, carries into the
    upper half just as often as the value lies nearer to the upper neighbour.
    """
    bits = values.view(torch.int32)
    bits = (bits + torch.randint_like(bits, 0, 1 << 16)) & -(1 << 16)
    return bits.view(torch.float32).to(torch.bfloat16)
