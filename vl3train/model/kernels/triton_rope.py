"""RoPE in place, in one pass over memory. Importing this needs triton, which comes with torch for CUDA.

What it computes is said in model/kernels/ops.py, which holds the same formula in torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vl3train.model.kernels.triton_norm import OF_A_PACK

TILE = (2, 64)
"""Rows, and chunks of values, that a program takes at a time; its threads take a chunk at once."""
CHUNK_SIZES = (8, 4, 2)
"""Values of a chunk, the first of which heads are whole numbers: 8, 16 bytes in bfloat16, for those of 72 and 128."""
STEPS = {False: 2, True: 8}
"""Tiles below one another that a program takes for each block of columns, without sums and with them, of which each
program leaves a row: the table's rows stay in its cache. 173 and 272 us for 49 472 rows of 48 heads of 72 (H100)."""


def rotate_kernel(rows: Tensor, table: Tensor, num_rotated: int, backward: bool, column_sums: bool) -> Tensor:
    """As ``vl3train::rotate``. Raises ValueError for rows with gaps between them."""
    num_rows, width = rows.shape
    head_dim = table.shape[1]
    if not rows.is_contiguous():
        raise ValueError("rotate works in place and takes whole rows only")
    tile_rows, chunks = TILE
    programs = triton.cdiv(num_rows, tile_rows * STEPS[column_sums])
    rotated = num_rotated * head_dim
    sums = rows.new_empty((programs if column_sums else 0, width), dtype=torch.float32)
    _rotate[(programs,)](
        rows,
        table.contiguous(),
        sums,
        num_rows,
        width,
        rotated,
        width if column_sums else rotated,
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


@triton.jit(do_not_specialize=OF_A_PACK)
def _rotate(
    rows,
    table,
    sums,
    num_rows,
    width,
    rotated,
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
        there = (column < columns)[None, :, None]
        turns = (column < rotated)[None, :, None]
        place = (column % HEAD_DIM // CHUNK * CHUNK)[None, :, None] + within
        at_column = column[None, :, None] + within
        totals = tl.zeros((ROWS, CHUNKS, CHUNK), dtype=tl.float32)
        for step in tl.range(STEPS):
            row = ((program * STEPS + step) * ROWS + tl.arange(0, ROWS))[:, None, None]
            inside = row < num_rows
            at = row.to(tl.int64) * width + at_column
            x = tl.load(rows + at, mask=inside & there, other=0.0).to(tl.float32)
            turn = tl.load(table + row.to(tl.int64) * HEAD_DIM + place, mask=inside & turns, other=0.0)
            one, other = tl.split(tl.reshape(x, (ROWS, CHUNKS, CHUNK // 2, 2)))
            c, s = tl.split(tl.reshape(turn.to(tl.float32), (ROWS, CHUNKS, CHUNK // 2, 2)))
            if BACKWARD:
                s = -s
            new = tl.join(one * c - other * s, other * c + one * s)
            new = tl.reshape(new, (ROWS, CHUNKS, CHUNK))
            tl.store(rows + at, new, mask=inside & turns)
            if SUMS:
                totals += tl.where(turns, new, x)
        if SUMS:
            below = tl.sum(totals, axis=0)[None, :, :]
            tl.store(sums + program * width + at_column, below, mask=there)
