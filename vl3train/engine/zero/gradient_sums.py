"""Gradients of a micro-batch copied or added to their float32 sums, near the speed of memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LARGE = 2**20
"""A gradient of this many values has a kernel launch of its own; those of biases and norms share a few launches."""


Pairs = Sequence[tuple[Tensor, Tensor]]
"""Sums and gradients, (n,) each, contiguous."""


@torch.no_grad()
def put_gradients(pairs: Pairs) -> None:
    """Copy each gradient, in any format, to its sum: those of a step's first micro-batch."""
    if pairs:
        torch._foreach_copy_([total for total, _ in pairs], [gradient for _, gradient in pairs])


@torch.no_grad()
def add_gradients(pairs: Pairs) -> None:
    """Add each gradient, in any format, to its sum."""
    if not pairs or not pairs[0][0].is_cuda:
        for total, gradient in pairs:
            total.add_(gradient)
        return
    from vl3train.model.kernels.triton_add import add_gradient

    small = [pair for pair in pairs if pair[0].numel() < LARGE]
    for total, gradient in pairs:
        if total.numel() >= LARGE:
            add_gradient(total, gradient)
    if small:
        # torch adds many tensors in one launch only where all have the same format.
        sums = [total for total, _ in small]
        sizes = [total.numel() for total in sums]
        same = list(sums[0].new_empty(sum(sizes)).split(sizes))
        torch._foreach_copy_(same, [gradient for _, gradient in small])
        torch._foreach_add_(sums, same)
