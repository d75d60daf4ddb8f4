"""RoPE in place, in one pass over memory. Importing this needs triton, which comes with torch for CUDA.

model/kernels/ops.py says what it computes, and has the same formula in torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vl3train.model.kernels.triton_norm import NOT_SPECIALIZED

TILE = (2, 64)
"""Rows, and chunks of values, that a program handles at a time; a thread loads a whole chunk."""
CHUNK_SIZES = (8, 4, 2)
"""Values of a chunk: the first of these that divides the head dimension. 8 for 72 and 128: 16 bytes in bfloat16."""
STEPS = {False: 2, True: 8}
"""Tiles of rows that a program handles in each block of columns, without and with column sums. Each program writes one
row of sums, so with sums it handles more; its rows of ``cos_sin`` stay in the cache. 173 and 272 us for 49 472 rows of
48 heads of 72 (H100)."""


def rotate_kernel(
    rows: Tensor, cos_sin: Tensor, num_rotary: int, backward: bool, column_sums: bool
) -> Tensor:
    """As ``vl3train::rotate``. Raises ValueError for rows that are not contiguous."""
    num_rows, width = rows.shape
    head_dim = cos_sin.shape[1]
    if not rows.is_contiguous():
        raise ValueError("rotate works in place and takes contiguous rows only")
    tile_rows, chunks = TILE
    programs = triton.cdiv(num_rows, tile_rows * STEPS[column_sums])
    rotary = num_rotary * head_dim
    sums = rows.new_empty((programs if column_sums else 0, width), dtype=torch.float32)
    _rotate[(programs,)](
        rows,
        cos_sin.contiguous(),
        sums,
        num_rows,
        width,
        rotary,
        width if column_sums else rotary,
        HEAD_DIM=head_dim,
        BACKWARD=backward,
        SUMS=column_sums,
        ROWS=tile_rows,
        CHUNKS=chunks,
        CHUNK=next(size for size in CHUNK_SIZES if head_dim % size == 0),
        STEPS=STEPS[column_sums],
        num_warps=4,
    )
    return sums.sum(0) if column_sums else rows.new_empty((0,), dtype=torch.float32)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _rotate(
    rows,
    cos_sin,
    sums,
    num_rows,
    width,
    rotary,
    columns,
    HEAD_DIM: tl.constexpr,
    BACKWARD: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
):
    program = tl.program_id(0)
    within = tl.arange(0, CHUNK)[None, None, :]
    for block in tl.range(0, columns, CHUNKS * CHUNK):
        column = (block // CHUNK + tl.arange(0, CHUNKS)) * CHUNK
        in_columns = (column < columns)[None, :, None]
        in_rotary = (column < rotary)[None, :, None]
        place = (column % HEAD_DIM // CHUNK * CHUNK)[None, :, None] + within
        at_column = column[None, :, None] + within
        totals = tl.zeros((ROWS, CHUNKS, CHUNK), dtype=tl.float32)
        for step in tl.range(STEPS):
            row = ((program * STEPS + step) * ROWS + tl.arange(0, ROWS))[:, None, None]
            inside = row < num_rows
            at = row.to(tl.int64) * width + at_column
            x = tl.load(rows + at, mask=inside & in_columns, other=0.0).to(tl.float32)
            angles = tl.load(
                cos_sin + row.to(tl.int64) * HEAD_DIM + place, mask=inside & in_rotary, other=0.0
            )
            a, b = tl.split(tl.reshape(x, (ROWS, CHUNKS, CHUNK // 2, 2)))
            c, s = tl.split(tl.reshape(angles.to(tl.float32), (ROWS, CHUNKS, CHUNK // 2, 2)))
            if BACKWARD:
                s = -s
            new = tl.join(a * c - b * s, b * c + a * s)
            new = tl.reshape(new, (ROWS, CHUNKS, CHUNK))
            tl.store(rows + at, new, mask=inside & in_rotary)
            if SUMS:
                totals += tl.where(in_rotary, new, x)
        if SUMS:
            column_sums = tl.sum(totals, axis=0)[None, :, :]
            tl.store(sums + program * width + at_column, column_sums, mask=in_columns)
