"""A float32 master in two halves: the bfloat16 weight itself, and the 16 bits that it lacks.

A master beside its weight says the upper half twice. So only the lower half is kept, 2 bytes in place of 4, as
TransformerEngine's FusedAdam does (``store_param_remainders``); the master is all there while it is updated.
The weight is the master rounded to the nearest, ties away from zero (torch's cast takes ties to even). Rounding away
from zero adds one to the upper half just where the lower half begins with a one, so it can be taken back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vl3train.model.compiling import compiled

LOW_BITS = "low_bits"
"""What AdamW's state calls the lower halves; checkpoints do too."""


def join(weight: Tensor, low: Tensor) -> Tensor:
    """The masters, float32, of weights (bfloat16) and their lower halves (int16), all of one shape."""
    joined, _ = _programs(weight.is_cuda)
    bits: Tensor = joined(_bits(weight), _bits(low))
    return bits.view(torch.float32)


def split(master: Tensor, weight: Tensor, low: Tensor) -> None:
    """Write masters (float32) into weights (bfloat16) and lower halves (int16), which ``join`` makes masters again.

    To the bit, but for what is no number: that comes back as NaN with other bits. What lies less than half a step of
    bfloat16 below infinity gives an infinite weight, as with any cast, and comes back finite.
    """
    _, halved = _programs(weight.is_cuda)
    halved(_bits(master), _bits(weight), _bits(low))


def _bits(values: Tensor) -> Tensor:
    # Lower halves too: what is viewed as whole numbers counts as no slice. Of slices the compiler minds what they are
    # cut from, and makes a program for each place.
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


@functools.cache
def _programs(on_gpu: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Each one kernel on a GPU, where torch's own ops would take the room of several pieces."""
    return compiled(_join, enabled=on_gpu), compiled(_split, enabled=on_gpu)


def _join(weight: Tensor, low: Tensor) -> Tensor:
    upper = weight.int() + (low.int() >> 15)  # plus -1 where the lower half begins with a one
    return (upper << 16) | (low.int() & 0xFFFF)


def _split(master: Tensor, weight: Tensor, low: Tensor) -> None:
    # A GPU's NaN has 31 ones: rounded up it would be a zero.
    is_nan = (master & 0x7FFFFFFF) > 0x7F800000
    master = torch.where(is_nan, 0x7FC00000, master)
    weight.copy_((master >> 16) + ((master >> 15) & 1))
    low.copy_((master << 16) >> 16)
