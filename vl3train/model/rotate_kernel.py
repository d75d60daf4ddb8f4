"""RoPE in place, in one pass over memory. Importing this needs triton, which comes with torch for CUDA.

What it computes is said in model/fused.py, which holds the same formula in torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vl3train.model.norm_kernels import multiprocessors

TILE = (8, 128)
"""Rows and pairs of values that a program takes at a time."""
CHUNKS = (8, 4, 2, 1)
"""Pairs that a thread loads at once, the first that divides half a head: 4 for heads of 72, 8 for those of 128. One at
a time is half as fast."""
PROGRAMS_PER_SM = 8
STAGES = 3
"""Tiles, of which two are on their way while the third is worked on."""


def rotate_kernel(rows: Tensor, cos: Tensor, sin: Tensor, num_rotated: int, backward: bool) -> Tensor:
    """As ``vl3train::rotate``: a program goes down its columns. Raises ValueError for rows with gaps between them."""
    if not rows.is_contiguous():
        raise ValueError("rotate works in place and takes whole rows only")
    num_rows, width = rows.shape
    head_dim = cos.shape[1]
    tile_rows, tile_pairs = TILE
    pairs = (width if backward else num_rotated * head_dim) // 2
    chunk = next(chunk for chunk in CHUNKS if head_dim // 2 % chunk == 0)
    blocks = triton.cdiv(pairs, tile_pairs)
    programs = max(1, PROGRAMS_PER_SM * multiprocessors(rows) // blocks)
    programs = min(programs, triton.cdiv(num_rows, tile_rows))
    sums = rows.new_empty((programs if backward else 0, width), dtype=torch.float32)
    _rotate[(blocks, programs)](
        rows,
        cos.contiguous(),
        sin.contiguous(),
        sums,
        num_rows,
        width,
        pairs,
        num_rotated * head_dim // 2,
        HEAD_DIM=head_dim,
        BACKWARD=backward,
        ROWS=tile_rows,
        CHUNKS=tile_pairs // chunk,
        CHUNK=chunk,
        STAGES=STAGES,
        num_warps=4,
    )
    return sums.sum(0) if backward else rows.new_empty((0,), dtype=torch.float32)


@triton.jit
def _rotate(
    rows,
    cos,
    sin,
    sums,
    num_rows,
    width,
    pairs,
    rotated_pairs,
    HEAD_DIM: tl.constexpr,
    BACKWARD: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Both values of a pair belong to one thread: what it writes, no other has still to read. Chunks of pairs lie in one
    # head: the compiler sees that their values are neighbours.
    HALF: tl.constexpr = HEAD_DIM // 2
    chunk = tl.program_id(0) * CHUNKS + tl.arange(0, CHUNKS)
    program = tl.program_id(1)
    programs = tl.num_programs(1)
    within = tl.arange(0, CHUNK)[None, None, :]
    place = (chunk % (HALF // CHUNK) * CHUNK)[None, :, None]
    column = (chunk // (HALF // CHUNK) * HEAD_DIM)[None, :, None] + place
    there = (chunk * CHUNK < pairs)[None, :, None]
    turns = (chunk * CHUNK < rotated_pairs)[None, :, None]
    sum_one = tl.zeros((ROWS, CHUNKS, CHUNK), dtype=tl.float32)
    sum_other = tl.zeros((ROWS, CHUNKS, CHUNK), dtype=tl.float32)
    for first in tl.range(program * ROWS, num_rows, programs * ROWS, num_stages=STAGES):
        row = (first + tl.arange(0, ROWS))[:, None, None]
        at = row.to(tl.int64) * width + column + within
        table = row.to(tl.int64) * HEAD_DIM + place + within
        inside = (row < num_rows) & there
        turned = (row < num_rows) & turns
        one = tl.load(rows + at, mask=inside, other=0.0).to(tl.float32)
        other = tl.load(rows + at + HALF, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(cos + table, mask=turned, other=1.0).to(tl.float32)
        s = tl.load(sin + table, mask=turned, other=0.0).to(tl.float32)
        if BACKWARD:
            s = -s
        new_one = one * c - other * s
        new_other = other * c + one * s
        tl.store(rows + at, new_one, mask=turned)
        tl.store(rows + at + HALF, new_other, mask=turned)
        if BACKWARD:
            sum_one += new_one
            sum_other += new_other
    if BACKWARD:
        out = sums + program * width + column + within
        tl.store(out, tl.sum(sum_one, axis=0)[None, :, :], mask=there)
        tl.store(out + HALF, tl.sum(sum_other, axis=0)[None, :, :], mask=there)
