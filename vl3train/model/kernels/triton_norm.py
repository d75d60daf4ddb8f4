"""Backward of norms and of GELU, each in one pass over memory. Importing this needs triton, from torch for CUDA.

R rows, W values a row. model/kernels/ops.py says what the results are, and has the same formulas in torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES_PER_WARP = 256
"""Values of a row for each warp of norm_backward: 8 a thread, one load of 16 bytes in bfloat16."""
WARPS_PER_SM = {0: 32, 1: 32, 2: 24, 3: 16, 4: 16}
"""Warps of norm_backward that fit into a multiprocessor at once, by the number of running sums; more would wait. triton
3.8 gives a thread 60 registers for one sum, 80 for two, 116 for four (for sm_90); a multiprocessor has 65 536."""
STAGES = 3
"""Rows, or tiles, in flight: two are loaded while the third is computed."""
GELU_PROGRAMS_PER_SM = 4
GELU_TILE = (8, 256)
"""Rows and columns that a program of gelu_backward handles at a time; the encoder's 4304 columns fill 17 such tiles."""
NOT_SPECIALIZED = ("num_rows",)
"""Arguments that change from pack to pack. triton would compile other kernels where they are 1 or a multiple of 16, and
gain nothing: they only bound loops and masks of whole rows."""
_INTERPRETED_PROGRAMS = 3
"""Without a GPU (TRITON_INTERPRET=1): few, so that each still handles several rows."""


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
    """As ``vl3train::norm_backward``; whole rows in registers. Raises ValueError unless there are 1 to 3 ``grads``."""
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
    """As ``vl3train::gelu_backward``: each program goes down its columns and sums them."""
    num_rows, width = intermediate.shape
    intermediate = intermediate.contiguous()
    if not grad.is_contiguous():
        raise ValueError("gelu_backward works in place and takes a contiguous gradient only")
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
    """How many multiprocessors the GPU has: they set the number of programs."""
    if not tensor.is_cuda:
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


@triton.jit
def _add_pairs(a0, b0, a1, b1):
    return a0 + a1, b0 + b1


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
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
            past_norm = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        # Two sums in one reduction: each reduction waits for all warps of the row.
        weighted = grad * w
        if CENTRED:
            mean, weighted_mean = tl.reduce((x, weighted), 0, _add_pairs)
            x = tl.where(inside, x - mean / width, 0.0)
        square, product = tl.reduce((x * x, weighted * x), 0, _add_pairs)
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
            d += past_norm
        tl.store(d_rows + at, d, mask=inside)
        if ROW_SUMS:
            row_sum += d
            if HAS_RESIDUAL:
                residual_sum += past_norm
        if RECOMPUTE_NORMED:
            y = x * w
            if HAS_BIAS:
                y += b
            tl.store(normed + at, y, mask=inside)
    # Columns past the width are not 0 after centring; they are never stored.
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


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _gelu_backward(
    grads,
    intermediate,
    activated,
    partial_sums,
    num_rows,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # The first axis runs fastest, so neighbouring programs read whole rows.
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    program = tl.program_id(1)
    programs = tl.num_programs(1)
    inside = columns < width
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in tl.range(program * ROWS, num_rows, programs * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * width + columns[None, :]
        mask = (row < num_rows)[:, None] & inside[None, :]
        x = tl.load(intermediate + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grads + at, mask=mask, other=0.0).to(tl.float32)
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        tanh = 1.0 - 2.0 / (tl.exp(2.0 * inner) + 1.0)
        half = 0.5 * (1.0 + tanh)
        slope = half + 0.5 * x * (1.0 - tanh * tanh) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        d = grad * slope
        sums += d
        tl.store(grads + at, d, mask=mask)
        tl.store(activated + at, x * half, mask=mask)
    tl.store(partial_sums + program * width + columns, tl.sum(sums, axis=0), mask=inside)
