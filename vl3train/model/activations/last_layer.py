"""After attention, the last layer of the language model computes only supervised tokens: the loss reads no others.

Its output projection and its MLP compute each row from that row alone, and no later layer reads the other rows. In a
pack of images about 5 % of the tokens are supervised: one of 28 layers does nearly nothing after attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vl3train.contracts.records import Batch


def last_positions(batch: Batch) -> Tensor | None:
    """(U,) supervised positions, the rows that the last layer computes after attention; None: it computes all rows.

    It computes all rows where more than three quarters are supervised: copying rows would cost about what it saves. And
    where one or none is: torch.compile would build separate kernels for so few rows.
    """
    num_supervised = batch.supervised_positions.shape[0]
    few = num_supervised >= 2 and 4 * num_supervised <= 3 * batch.input_ids.shape[0]
    return batch.supervised_positions if few else None


def rows_at(positions: Tensor | None, rows: Tensor) -> Tensor:
    """(T, H) -> the (U, H) rows at ``positions``, which are all different; all rows for None."""
    if positions is None:
        return rows
    if not rows.requires_grad:
        return rows.index_select(0, positions)
    chosen: Tensor = _RowsAt.apply(rows, positions)
    return chosen


class _RowsAt(torch.autograd.Function):
    """index_select for distinct positions. torch's gradient allows equal ones: a sort and a slow pass in bfloat16."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.num_rows = rows.shape[0]
        return rows.index_select(0, positions)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (positions,) = ctx.saved_tensors
        return grad.new_zeros((ctx.num_rows, grad.shape[1])).index_copy(0, positions, grad), None
