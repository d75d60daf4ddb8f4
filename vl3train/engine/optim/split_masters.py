"""A float32 master weight in two halves: the bfloat16 weight itself, and the 16 bits that it lacks.

A master beside its weight stores the upper half twice. So we keep only the lower half, 2 bytes instead of 4, as
TransformerEngine's FusedAdam does (``store_param_remainders``); the whole master exists while it is updated. The weight
is the master rounded to the nearest, ties away from zero (torch's cast rounds ties to even). Rounding away from zero
adds one to the upper half exactly where the lower half begins with a one, so it can be undone.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW_BITS = "low_bits"
"""The name of the lower halves in AdamW's state, and so in checkpoints."""


@torch.no_grad()
def join(weight: Tensor, low: Tensor) -> Tensor:
    """The masters (n,) float32 of weights (n,) bfloat16 and their lower halves (n,) int16."""
    weight_bits = weight.view(torch.int16)
    if weight.is_cuda:
        from vl3train.model.kernels.triton_split import join_bits

        bits = torch.empty_like(low, dtype=torch.int32)
        join_bits(weight_bits, low, bits)
    else:
        upper = weight_bits.int() + (low.int() >> 15)  # plus -1 where the lower half begins with a one
        bits = (upper << 16) | (low.int() & 0xFFFF)
    return bits.view(torch.float32)


@torch.no_grad()
def split(master: Tensor, weight: Tensor, low: Tensor) -> None:
    """Write masters (float32) into weights (bfloat16) and lower halves (int16); ``join`` undoes it, bit for bit.

    Except that a NaN comes back as a NaN with other bits. A finite master that rounds to infinity gives an infinite
    weight, as with any cast, and comes back finite.
    """
    bits, weight_bits = master.view(torch.int32), weight.view(torch.int16)
    if master.is_cuda:
        from vl3train.model.kernels.triton_split import split_bits

        return split_bits(bits, weight_bits, low)
    # A GPU's NaN has 31 ones: rounded up, it would become zero.
    bits = torch.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits)
    weight_bits.copy_((bits >> 16) + ((bits >> 15) & 1))
    low.copy_((bits << 16) >> 16)
