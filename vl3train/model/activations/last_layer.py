"""Past attention the last layer of the language model works for the tokens that the loss reads, and for no others.

Its output product and its MLP make each row from that row alone, and no layer follows that would read the rest. Of a
pack of images some 5 % of the tokens are supervised: one of 28 layers does nearly nothing past attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vl3train.contracts.records import Batch


def last_positions(batch: Batch) -> Tensor | None:
    """(U,) supervised positions, which the last layer goes on with; None where it goes on with all.

    All are taken beyond three quarters, where what copying rows takes is about what it spares, and for a single row
    or none, for which torch.compile would make kernels of their own.
    """
    num_supervised = batch.supervised_positions.shape[0]
    few = num_supervised >= 2 and 4 * num_supervised <= 3 * batch.input_ids.shape[0]
    return batch.supervised_positions if few else None


def rows_at(positions: Tensor | None, rows: Tensor) -> Tensor:
    """(T, H) -> the (U, H) rows at ``positions``, none of which comes twice; all of them for None."""
    if positions is None:
        return rows
    if not rows.requires_grad:
        return rows.index_select(0, positions)
    chosen: Tensor = _RowsAt.apply(rows, positions)
    return chosen


class _RowsAt(torch.autograd.Function):
    """index_select, whose own gradient has to add, for rows that come twice: in bfloat16 a sort and a slow pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.num_rows = rows.shape[0]
        return rows.index_select(0, positions)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (positions,) = ctx.saved_tensors
        return grad.new_zeros((ctx.num_rows, grad.shape[1])).index_copy(0, positions, grad), None
