"""The two ways between a master and its halves, one pass each. Importing this needs triton, which comes with torch for
CUDA.

torch's compiler stores the halves one by one where lengths may change: 194 us for 32 Mi values on an H200, of which the
bytes need some 65 (benchmarks/log.md, round six).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Values of a program of 128 threads: each has 16, so that halves are written 16 bytes at once."""


def join_bits(weight: Tensor, low: Tensor, master: Tensor) -> None:
    """Write the bits of masters (n,) int32, from those of weights and lower halves, int16; all contiguous."""
    size = master.numel()
    _join[(triton.cdiv(size, BLOCK),)](weight, low, master, size, BLOCK=BLOCK, num_warps=4)


def split_bits(master: Tensor, weight: Tensor, low: Tensor) -> None:
    """The other way."""
    size = master.numel()
    _split[(triton.cdiv(size, BLOCK),)](master, weight, low, size, BLOCK=BLOCK, num_warps=4)


@triton.jit
def _join(weight, low, master, size, BLOCK: tl.constexpr):  # triton reads annotations
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    upper = tl.load(weight + at, mask=inside, other=0).to(tl.int32)
    lower = tl.load(low + at, mask=inside, other=0).to(tl.int32)
    tl.store(master + at, ((upper + (lower >> 15)) << 16) | (lower & 0xFFFF), mask=inside)


@triton.jit
def _split(master, weight, low, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    bits = tl.load(master + at, mask=inside, other=0)
    bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits)
    tl.store(weight + at, ((bits >> 16) + ((bits >> 15) & 1)).to(tl.int16), mask=inside)
    tl.store(low + at, ((bits << 16) >> 16).to(tl.int16), mask=inside)
