"""Two backward kernels in one pass over memory each. Importing this needs triton, which comes with torch for CUDA.

R rows, W values a row. What the outputs mean is said in model/kernels/ops.py, which holds the same formulas in torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES_PER_WARP = 256
"""Of a row, in norm_backward: 8 a thread, which loads them at once, 16 bytes in bfloat16."""
WARPS_PER_SM = {0: 32, 1: 32, 2: 24, 3: 16, 4: 16}
"""Warps of norm_backward that a multiprocessor holds at once, by the number of running sums: more would wait for the
others to end. triton 3.8 gives a thread 60 registers for one sum, 80 for two, 116 for four (for sm_90), of 65 536."""
STAGES = 3
"""Rows, or tiles, of which two are on their way while the third is worked on."""
GELU_PROGRAMS_PER_SM = 4
GELU_TILE = (8, 256)
"""Rows and columns that a program of gelu_backward takes at a time; 4304, the encoder's, fill 17 such columns."""
OF_A_PACK = ("num_rows",)
"""What changes from pack to pack, which triton else compiles anew for where it is a multiple of 16, and where it is 1.
It bounds loops and masks of whole rows only: the loads and stores are the same."""
_INTERPRETED_PROGRAMS = 3
"""Where there is no GPU (TRITON_INTERPRET=1): few, so that each still takes several rows."""


def norm_backward_kernel(
    grads: Sequence[Tensor],
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual_grad: Tensor | None,
    centred: bool,
    recompute_normed: bool,
    weight_sums: bool,
    row_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``vl3train::norm_backward``; a whole row is held in registers. Raises ValueError for over 3 gradients."""
    if not 1 <= len(grads) <= 3:
        raise ValueError(f"norm_backward adds up 1 to 3 gradients, not {len(grads)}")
    num_rows, width = rows.shape
    rows = rows.contiguous()
    g0, g1, g2 = [grad.contiguous() for grad in grads] + [rows] * (3 - len(grads))
    residual = rows if residual_grad is None else residual_grad.contiguous()
    d_rows = torch.empty_like(rows)
    normed = torch.empty_like(rows) if recompute_normed else rows.new_empty((0, width))
    num_sums = weight_sums * (1 + (bias is not None)) + row_sums * (1 + (residual_grad is not None))
    block = triton.next_power_of_2(width)
    num_warps = max(1, min(16, block // VALUES_PER_WARP))
    programs = min(num_rows, max(1, WARPS_PER_SM[num_sums] // num_warps) * multiprocessors(rows))
    partial_sums = rows.new_empty((num_sums, programs, width), dtype=torch.float32)
    _norm_backward[(programs,)](
        g0,
        g1,
        g2,
        rows,
        weight,
        weight if bias is None else bias,
        residual,
        d_rows,
        normed,
        partial_sums,
        num_rows,
        width,
        eps,
        NUM_GRADS=len(grads),
        CENTRED=centred,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual_grad is not None,
        RECOMPUTE_NORMED=recompute_normed,
        WEIGHT_SUMS=weight_sums,
        ROW_SUMS=row_sums,
        BLOCK=block,
        STAGES=STAGES,
        num_warps=num_warps,
    )
    return d_rows, normed, partial_sums.sum(1)


def gelu_backward_kernel(grad: Tensor, intermediate: Tensor) -> tuple[Tensor, Tensor]:
    """As ``vl3train::gelu_backward``: each program goes down its columns and keeps their sums."""
    num_rows, width = intermediate.shape
    intermediate = intermediate.contiguous()
    if not grad.is_contiguous():
        raise ValueError("gelu_backward works in place and takes its gradient in whole rows only")
    activated = torch.empty_like(intermediate)
    tile_rows, tile_columns = GELU_TILE
    column_blocks = triton.cdiv(width, tile_columns)
    row_programs = max(1, GELU_PROGRAMS_PER_SM * multiprocessors(intermediate) // column_blocks)
    row_programs = min(row_programs, triton.cdiv(num_rows, tile_rows))
    partial_sums = intermediate.new_empty((row_programs, width), dtype=torch.float32)
    _gelu_backward[(column_blocks, row_programs)](
        grad,
        intermediate,
        activated,
        partial_sums,
        num_rows,
        width,
        ROWS=tile_rows,
        COLUMNS=tile_columns,
        STAGES=STAGES,
        num_warps=8,
    )
    return activated, partial_sums.sum(0)


def multiprocessors(tensor: Tensor) -> int:
    """How many a GPU has; programs are counted by them."""
    if not tensor.is_cuda:
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


@triton.jit
def _add_both(one, other, more_of_one, more_of_other):
    return one + more_of_one, other + more_of_other


@triton.jit(do_not_specialize=OF_A_PACK)
def _norm_backward(
    g0,
    g1,
    g2,
    rows,
    weight,
    bias,
    residual,
    d_rows,
    normed,
    partial_sums,
    num_rows,
    width,
    eps,
    NUM_GRADS: tl.constexpr,
    CENTRED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RECOMPUTE_NORMED: tl.constexpr,
    WEIGHT_SUMS: tl.constexpr,
    ROW_SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if RECOMPUTE_NORMED and HAS_BIAS:
        b = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    bias_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    row_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    residual_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in tl.range(program, num_rows, programs, num_stages=STAGES):
        at = tl.cast(row, tl.int64) * width + columns
        x = tl.load(rows + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(g0 + at, mask=inside, other=0.0).to(tl.float32)
        if NUM_GRADS > 1:
            grad += tl.load(g1 + at, mask=inside, other=0.0).to(tl.float32)
        if NUM_GRADS > 2:
            grad += tl.load(g2 + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            passed = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        # Sums that are known together are taken together: each waits for all warps of the row.
        weighted = grad * w
        if CENTRED:
            mean, weighted_mean = tl.reduce((x, weighted), 0, _add_both)
            x = tl.where(inside, x - mean / width, 0.0)
        square, product = tl.reduce((x * x, weighted * x), 0, _add_both)
        rstd = 1.0 / tl.sqrt(square / width + eps)
        x = x * rstd
        if WEIGHT_SUMS:
            weight_sum += grad * x
            if HAS_BIAS:
                bias_sum += grad
        d = weighted - x * (product * rstd / width)
        if CENTRED:
            d -= weighted_mean / width
        d = d * rstd
        if HAS_RESIDUAL:
            d += passed
        tl.store(d_rows + at, d, mask=inside)
        if ROW_SUMS:
            row_sum += d
            if HAS_RESIDUAL:
                residual_sum += passed
        if RECOMPUTE_NORMED:
            y = x * w
            if HAS_BIAS:
                y += b
            tl.store(normed + at, y, mask=inside)
    # Columns past the width hold what centring made of them: they are never stored.
    sums = partial_sums + program * width + columns
    if WEIGHT_SUMS:
        tl.store(sums, weight_sum, mask=inside)
        sums += programs * width
        if HAS_BIAS:
            tl.store(sums, bias_sum, mask=inside)
            sums += programs * width
    if ROW_SUMS:
        tl.store(sums, row_sum, mask=inside)
        sums += programs * width
        if HAS_RESIDUAL:
            tl.store(sums, residual_sum, mask=inside)


@triton.jit(do_not_specialize=OF_A_PACK)
def _gelu_backward(
    grads,
    wides,
    activated,
    partial_sums,
    num_rows,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # The first axis runs fastest: programs side by side read whole rows.
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    program = tl.program_id(1)
    programs = tl.num_programs(1)
    inside = columns < width
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in tl.range(program * ROWS, num_rows, programs * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * width + columns[None, :]
        mask = (row < num_rows)[:, None] & inside[None, :]
        x = tl.load(wides + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grads + at, mask=mask, other=0.0).to(tl.float32)
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        tanh = 1.0 - 2.0 / (tl.exp(2.0 * inner) + 1.0)
        share = 0.5 * (1.0 + tanh)
        slope = share + 0.5 * x * (1.0 - tanh * tanh) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        d = grad * slope
        sums += d
        tl.store(grads + at, d, mask=mask)
        tl.store(activated + at, x * share, mask=mask)
    tl.store(partial_sums + program * width + columns, tl.sum(sums, axis=0), mask=inside)
