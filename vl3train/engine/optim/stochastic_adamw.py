"""AdamW with stochastic rounding: moments in bfloat16 (4 bytes a parameter, not 8), and weights without masters.

bfloat16 keeps 8 bits of a number. The second moment changes by a thousandth in a step (beta2 = 0.999). Rounding to the
nearest would lose that change in every step, and the moment would stay at half its true value. Stochastic rounding goes
up or down at random, more often to the nearer value, so the moment is right on average. The same holds for bfloat16
weights without float32 masters (arXiv:2010.06192, section 4): at a rate of 1e-5 few updates reach half the distance
between two bfloat16 values. The arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vl3train.model.compiling import compiled

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Their names in the state of torch's AdamW, and so in DeepSpeed's checkpoints."""


class StochasticAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW, except for the rounding of its moments and of bfloat16 weights."""

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
        self.found_inf: Tensor | None = None
        """0-d, on the device: where it is 1, ``step`` changes no weight and no moment. None: it is 0."""
        self._counted: list[dict[str, Any]] = []  # states whose count the step in progress has raised

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "this optimizer does not evaluate the loss again"
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
                self._counted.append(state)
                rate, corrected = group["lr"], (1 - beta2 ** state["step"]) ** 0.5
                numbers = [
                    *(beta1, beta2, group["eps"], 1 - rate * group["weight_decay"]),
                    *(corrected, rate / (1 - beta1 ** state["step"])),
                ]
                # A tensor: for plain numbers the compiler would compile a graph for each value.
                values = torch.tensor(numbers, dtype=torch.float32)
                if parameter.is_cuda:
                    values = values.pin_memory().to(parameter.device, non_blocking=True)
                skip = values.new_zeros(()) if self.found_inf is None else self.found_inf
                # Detached: the compiler takes the size of a Parameter as fixed.
                moments = [state[name] for name in MOMENTS]
                self._update(parameter.detach(), parameter.grad, *moments, values, skip)

    def end_step(self, *, is_skipped: bool) -> None:
        """Take back the counts of a step that was skipped: the device decided that, and the host knows it now."""
        for state in self._counted:
            state["step"] -= is_skipped
        self._counted = []

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but the moments stay bfloat16: torch casts them to the dtype of their parameter."""
        super().load_state_dict(state_dict)
        self._counted = []
        for state in self.state.values():
            for name in MOMENTS:
                state[name] = state[name].to(torch.bfloat16)  # what was bfloat16 loses nothing


def _update(
    parameter: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, values: Tensor, skip: Tensor
) -> None:
    """AdamW in float32 (arXiv:1711.05101, algorithm 2), in torch's order of operations; nothing where ``skip`` is 1."""
    beta1, beta2, eps, decay, corrected, rate = values.unbind()
    grad = gradient.float()
    new_mean = mean.float() * beta1 + grad * (1 - beta1)
    new_square = square.float() * beta2 + grad * grad * (1 - beta2)
    new = parameter.float() * decay - rate * new_mean / (new_square.sqrt() / corrected + eps)
    new = new if parameter.dtype == torch.float32 else round_stochastically(new)
    # Selected, not multiplied: zero times NaN is NaN.
    parameter.copy_(torch.where(skip > 0, parameter, new))
    mean.copy_(torch.where(skip > 0, mean, round_stochastically(new_mean)))
    square.copy_(torch.where(skip > 0, square, round_stochastically(new_square)))


def round_stochastically(values: Tensor) -> Tensor:
    """float32 -> bfloat16, rounded up or down at random so that the expected value is exact.

    bfloat16 is the upper half of a float32's bits. A random number as large as the lower half is added: how often it
    carries into the upper half is how near the value is to the upper neighbour.
    """
    bits = values.view(torch.int32)
    bits = (bits + torch.randint_like(bits, 0, 1 << 16)) & -(1 << 16)
    return bits.view(torch.float32).to(torch.bfloat16)
