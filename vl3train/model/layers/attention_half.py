"""The first half of a layer as autograd functions: norm, matrix products and attention.

Only compiled layers of plain modules use them (model/layers/layers.py). torch.compile traces these functions and fuses
the elementwise work between the matrix products; what it cannot fuse are ops of model/kernels/ops.py. The second half
is in model/layers/mlp_half.py. R rows, W values a row.

``forward`` takes many plain arguments: torch.autograd.Function looks for tensors among the arguments only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vl3train.model.attention.qkv_op import qkv_attention, qkv_attention_backward
from vl3train.model.kernels.gemm_ops import ROPE_HEAD_DIMS, linear_rotate, rows_gemm
from vl3train.model.kernels.ops import (
    interleave_pairs,
    norm_backward,
    norm_grads,
    normed_rows,
    rotate,
    separate_pairs,
)

Grads = tuple[Tensor | None, ...]


class NormAttention(torch.autograd.Function):
    """Norm, one matrix product for queries, keys and values, RoPE and attention."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        eps: float,
        cos_sin: Tensor,
        cu_seqlens: Tensor,
        head_dim: int,
        max_seqlen: int,
        backend: str,
        causal: bool,
        scale: float,
        quack: bool,
        *linears: Any,
    ) -> tuple[Tensor, Tensor]:
        """``rows`` (R, W) -> the rows, for the residual, and the result of attention (R, heads * D).

        ``linears`` are the weights (out, W) of queries, keys and values, then their biases, all or none of them, then
        the tensors of ``Segments.shared``. The language model has an RMSNorm (``norm_bias`` is None), the encoder a
        LayerNorm.
        """
        weights, biases, shared = linears[:3], linears[3:6], linears[6:]
        normed = normed_rows(rows, norm_weight, norm_bias, eps, norm_bias is not None)
        weight = merge_qkv(weights, head_dim)
        bias = None if biases[0] is None else merge_qkv(biases, head_dim)
        num_heads, kv_heads = (len(weight) // head_dim for weight in weights[:2])
        ctx.num_rotary = num_heads + kv_heads
        ctx.attention = head_dim, num_heads, max_seqlen, backend, causal, scale
        if quack and bias is not None and head_dim in ROPE_HEAD_DIMS:
            qkv = linear_rotate(normed, weight, bias, cos_sin, ctx.num_rotary)
        else:
            qkv = F.linear(normed, weight, bias)
            rotate(qkv, cos_sin, ctx.num_rotary, False, False)
        out, log_sum_exp = qkv_attention(qkv, cu_seqlens, shared, *ctx.attention)
        ctx.save_for_backward(
            rows, norm_weight, norm_bias, cos_sin, cu_seqlens, qkv, out, log_sum_exp, *weights, *shared
        )
        ctx.eps, ctx.quack = eps, quack
        return rows.view_as(rows), out

    @staticmethod
    def backward(ctx: Any, residual_grad: Tensor, d_out: Tensor) -> Grads:
        """Gradients of rows, norm, weights and biases."""
        saved = ctx.saved_tensors
        rows, norm_weight, norm_bias, cos_sin, cu_seqlens, qkv, out, log_sum_exp, *rest = saved
        weights, shared = rest[:3], rest[3:]
        needs_norm, needs_linears = ctx.needs_input_grad[1:3], ctx.needs_input_grad[12:18]
        head_dim = ctx.attention[0]
        d_qkv = qkv_attention_backward(d_out, qkv, out, log_sum_exp, cu_seqlens, shared, *ctx.attention)
        weight = merge_qkv(weights, head_dim)
        bias_sums = rotate(d_qkv, cos_sin, ctx.num_rotary, True, any(needs_linears[3:]))
        d_rows, normed, sums = norm_backward(
            [rows_gemm(d_qkv, weight) if ctx.quack else d_qkv @ weight],
            rows,
            norm_weight,
            norm_bias,
            ctx.eps,
            residual_grad,
            norm_bias is not None,
            any(needs_linears[:3]),
            any(needs_norm),
            False,
        )
        d_linears: list[Tensor | None] = [None] * 6
        widths = [len(weight) for weight in weights]
        if any(needs_linears[:3]):
            d_weights = d_qkv.t() @ normed
            d_linears[:3] = split_qkv(d_weights, widths, head_dim)
        if any(needs_linears[3:]):
            d_linears[3:] = split_qkv(bias_sums.to(rows.dtype), widths, head_dim)
        needed = (d if needs else None for d, needs in zip(d_linears, needs_linears, strict=True))
        of_norm = norm_grads(sums, needs_norm, norm_weight)
        return d_rows, *of_norm, *(None,) * 9, *needed, *(None,) * len(shared)


def merge_qkv(tensors: Sequence[Tensor], head_dim: int) -> Tensor:
    """Weights (or biases) of queries, keys and values, one below the other, with the pairs of RoPE interleaved."""
    q, k, v = tensors
    return torch.cat((interleave_pairs(q, head_dim), interleave_pairs(k, head_dim), v))


def split_qkv(merged: Tensor, widths: list[int], head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of ``merge_qkv``; ``widths`` are the rows of each."""
    q, k, v = merged.split(widths)
    return separate_pairs(q, head_dim), separate_pairs(k, head_dim), v


class NormLinears(torch.autograd.Function):
    """A norm and the matrix products that read it.

    The rows are a result too, for the residual. So its gradient arrives here, and norm_backward adds it in one pass.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, eps: float, *linears: Any
    ) -> tuple[Tensor, ...]:
        """``rows`` (R, W) -> the rows, and (R, out) for each matrix product.

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
        needs_norm, needs_linears = ctx.needs_input_grad[1:3], ctx.needs_input_grad[4:]
        needs_weights, needs_biases = needs_linears[: len(weights)], needs_linears[len(weights) :]
        d_rows, normed, sums = norm_backward(
            [grad @ weight for grad, weight in zip(grads, weights, strict=True)],
            rows,
            norm_weight,
            norm_bias,
            ctx.eps,
            residual_grad,
            norm_bias is not None,
            any(needs_weights),
            any(needs_norm),
            False,
        )
        d_weights = [
            grad.t() @ normed if needs else None for grad, needs in zip(grads, needs_weights, strict=True)
        ]
        d_biases = [grad.sum(0) if needs else None for grad, needs in zip(grads, needs_biases, strict=True)]
        return d_rows, *norm_grads(sums, needs_norm, norm_weight), None, *d_weights, *d_biases
