"""Splits float32 masters into bfloat16 weights and the lower bits, and joins them, in one pass each.

Importing this needs triton, which comes with torch for CUDA. torch.compile stores the halves one value at a time where
lengths may change: 194 us for 32 Mi values on an H200, where the bytes need some 65 (benchmarks/log.md, round six).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Values for each program of 128 threads: 16 a thread, so that halves are written 16 bytes at a time."""


def join_bits(weight: Tensor, low: Tensor, master: Tensor) -> None:
    """Write ``master`` (n,) int32 from ``weight`` and ``low`` (n,) int16: bits of the numbers; all contiguous."""
    size = master.numel()
    _join[(triton.cdiv(size, BLOCK),)](weight, low, master, size, BLOCK=BLOCK, num_warps=4)


def split_bits(master: Tensor, weight: Tensor, low: Tensor) -> None:
    """Write ``weight`` and ``low`` (n,) int16 from ``master`` (n,) int32: the inverse of ``join_bits``."""
    size = master.numel()
    _split[(triton.cdiv(size, BLOCK),)](master, weight, low, size, BLOCK=BLOCK, num_warps=4)


@triton.jit
def _join(weight, low, master, size, BLOCK: tl.constexpr):  # triton reads annotations: none but constexpr
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
