"""The first half of a layer as functions that know their gradients: norm, products and attention.

Only compiled layers of plain modules come here (model/layers/layers.py): torch.compile traces these functions and
fuses what lies between their products; the passes that it does not make by itself are ops of model/kernels/ops.py. R
rows, W values a row. The other half is in model/layers/mlp_half.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vl3train.model.attention.qkv_op import qkv_attention, qkv_attention_backward
from vl3train.model.kernels.gemm_ops import ROTATED_HEADS, linear_rotate, rows_gemm
from vl3train.model.kernels.ops import (
    norm_backward,
    norm_grads,
    normed_rows,
    pairs_apart,
    pairs_together,
    rotate,
)

Grads = tuple[Tensor | None, ...]


class NormAttention(torch.autograd.Function):
    """Norm, one product for queries, keys and values, RoPE and attention; the rows come out for the residual."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        eps: float,
        table: Tensor,
        cu_seqlens: Tensor,
        head_dim: int,
        max_seqlen: int,
        backend: str,
        causal: bool,
        scale: float,
        quack: bool,
        *linears: Any,
    ) -> tuple[Tensor, Tensor]:
        """(R, W) rows -> the rows, and attention's (R, heads * D) result.

        ``linears`` are the weights (out, W) of the three products, then their biases, all or none of them. A causal
        language model has an RMSNorm (``norm_bias`` None), the encoder a LayerNorm.
        """
        weights, biases = linears[:3], linears[3:]
        normed = normed_rows(rows, norm_weight, norm_bias, eps, norm_bias is not None)
        weight, bias = merged(weights, head_dim), None if biases[0] is None else merged(biases, head_dim)
        num_heads, kv_heads = (len(weight) // head_dim for weight in weights[:2])
        ctx.rotated, ctx.of_attention = (
            num_heads + kv_heads,
            (head_dim, num_heads, max_seqlen, backend, causal, scale),
        )
        if quack and bias is not None and head_dim in ROTATED_HEADS:
            qkv = linear_rotate(normed, weight, bias, table, ctx.rotated)
        else:
            qkv = F.linear(normed, weight, bias)
            rotate(qkv, table, ctx.rotated, False, False)
        out, log_sum_exp = qkv_attention(qkv, cu_seqlens, *ctx.of_attention)
        ctx.save_for_backward(
            rows, norm_weight, norm_bias, table, cu_seqlens, qkv, out, log_sum_exp, *weights
        )
        ctx.eps, ctx.quack = eps, quack
        return rows.view_as(rows), out

    @staticmethod
    def backward(ctx: Any, residual_grad: Tensor, d_out: Tensor) -> Grads:
        """Gradients of rows, norm, weights and biases."""
        saved = ctx.saved_tensors
        rows, norm_weight, norm_bias, table, cu_seqlens, qkv, out, log_sum_exp, *weights = saved
        of_norm, of_linears = ctx.needs_input_grad[1:3], ctx.needs_input_grad[12:]
        head_dim = ctx.of_attention[0]
        d_qkv = qkv_attention_backward(d_out, qkv, out, log_sum_exp, cu_seqlens, *ctx.of_attention)
        weight = merged(weights, head_dim)
        bias_sums = rotate(d_qkv, table, ctx.rotated, True, any(of_linears[3:]))
        d_rows, normed, sums = norm_backward(
            [rows_gemm(d_qkv, weight) if ctx.quack else d_qkv @ weight],
            rows,
            norm_weight,
            norm_bias,
            ctx.eps,
            residual_grad,
            norm_bias is not None,
            any(of_linears[:3]),
            any(of_norm),
            False,
        )
        d_linears: list[Tensor | None] = [None] * 6
        widths = [len(weight) for weight in weights]
        if any(of_linears[:3]):
            d_weights = d_qkv.t() @ normed
            d_linears[:3] = parted(d_weights, widths, head_dim)
        if any(of_linears[3:]):
            d_linears[3:] = parted(bias_sums.to(rows.dtype), widths, head_dim)
        wanted = (d if of else None for d, of in zip(d_linears, of_linears, strict=True))
        return d_rows, *norm_grads(sums, of_norm, norm_weight), *(None,) * 9, *wanted


def merged(of_qkv: Sequence[Tensor], head_dim: int) -> Tensor:
    """Weights (or biases) of queries, keys and values, one below the other, the pairs that RoPE turns together."""
    q, k, v = of_qkv
    return torch.cat((pairs_together(q, head_dim), pairs_together(k, head_dim), v))


def parted(merged: Tensor, widths: list[int], head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The way back."""
    q, k, v = merged.split(widths)
    return pairs_apart(q, head_dim), pairs_apart(k, head_dim), v


class NormLinears(torch.autograd.Function):
    """A norm and the products that read it; the rows come out as they are, for the residual.

    So the residual's gradient comes back here too, and everything is added up in the norm's one pass.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, eps: float, *linears: Any
    ) -> tuple[Tensor, ...]:
        """(R, W) rows -> the rows, and (R, out) for each product.

        ``linears`` are the weights (out, W), then as many biases or None.
        """
        weights, biases = linears[: len(linears) // 2], linears[len(linears) // 2 :]
        normed = normed_rows(rows, norm_weight, norm_bias, eps, norm_bias is not None)
        ctx.save_for_backward(rows, norm_weight, norm_bias, *weights)
        ctx.eps = eps
        outputs = [F.linear(normed, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        return rows.view_as(rows), *outputs

    @staticmethod
    def backward(ctx: Any, residual_grad: Tensor, *grads: Tensor) -> Grads:
        """Gradients of rows, norm, weights and biases."""
        rows, norm_weight, norm_bias, *weights = ctx.saved_tensors
        of_norm, of_linears = ctx.needs_input_grad[1:3], ctx.needs_input_grad[4:]
        of_weights, of_biases = of_linears[: len(weights)], of_linears[len(weights) :]
        d_rows, normed, sums = norm_backward(
            [grad @ weight for grad, weight in zip(grads, weights, strict=True)],
            rows,
            norm_weight,
            norm_bias,
            ctx.eps,
            residual_grad,
            norm_bias is not None,
            any(of_weights),
            any(of_norm),
            False,
        )
        d_weights = [grad.t() @ normed if of else None for grad, of in zip(grads, of_weights, strict=True)]
        d_biases = [grad.sum(0) if of else None for grad, of in zip(grads, of_biases, strict=True)]
        return d_rows, *norm_grads(sums, of_norm, norm_weight), None, *d_weights, *d_biases
