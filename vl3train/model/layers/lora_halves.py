"""Both halves of a language model's layer with frozen weights and LoRA adapters, as autograd functions.

LoRA (https://arxiv.org/abs/2106.09685, section 4.1) adds scaling * (x A^T) B^T to a matrix product x W^T. Here both are
one product: [x | u] [W | B]^T with u = scaling * x A^T. So the adapter's result is not written, read and added
separately, and the epilogue of the product (RoPE, SwiGLU, residual) stays fused. W is copied next to B for this, which
takes as long as some 200 rows of the product. A W in 4 bits (model/kernels/nf4.py) comes as its bytes, and is
dequantized in both passes. Compiled layers use these functions (model/layers/lora_dispatch.py), with
the ops of model/kernels/gemm_ops.py.

R rows, W the hidden_size, I the intermediate_size, r the adapters' rank. ``forward`` takes many plain arguments:
torch.autograd.Function looks for tensors among the arguments only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vl3train.model.attention.qkv_op import qkv_attention, qkv_attention_backward
from vl3train.model.kernels.gemm_ops import (
    ROPE_HEAD_DIMS,
    gate_up_rows_grad,
    gate_up_weights_grad,
    linear_add,
    linear_rotate,
    linear_swiglu,
    recompute_gate_up,
    rows_gemm,
    swiglu_linear_backward,
)
from vl3train.model.kernels.nf4 import whole_weight
from vl3train.model.kernels.ops import norm_backward, norm_grads, normed_rows, rotate
from vl3train.model.layers.attention_half import Grads, merge_qkv, split_qkv


class AdaptedSwigluMlp(torch.autograd.Function):
    """The language model's RMSNorm, MLP with adapters on its three matrix products, and the residual."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        norm_weight: Tensor,
        eps: float,
        level: str,
        scaling: float,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        gate_a: Tensor,
        up_a: Tensor,
        down_a: Tensor,
        gate_b: Tensor,
        up_b: Tensor,
        down_b: Tensor,
    ) -> Tensor:
        """``rows`` (R, W) -> (R, W).

        ``gate`` and ``up`` (I, W), ``down`` (W, I), then A (r, in) and B (out, r) of each. For the backward pass
        ``gate_up`` is kept; at ``level`` mlp nothing of the MLP's inner rows, at nothing the result of SwiGLU too.
        """
        normed = normed_rows(rows, norm_weight, None, eps, False)
        inner = normed @ torch.cat((gate_a, up_a)).t() * scaling
        extended = extend_with_b([gate, up], [gate_b, up_b], rows.shape[1], None).chunk(2)
        gate_up, activated = linear_swiglu(torch.cat((normed, inner), 1), *extended, level != "mlp")
        inner_down = activated @ down_a.t() * scaling
        whole_down = whole_weight(down, (len(down_b), down_a.shape[1]), rows.dtype, None)
        result = linear_add(activated, whole_down, None, torch.addmm(rows, inner_down, down_b.t()))
        weights = gate, up, down, gate_a, up_a, down_a, gate_b, up_b, down_b
        kept = None if level == "mlp" else gate_up, activated if level == "nothing" else None
        ctx.save_for_backward(rows, norm_weight, inner, inner_down, *weights, *kept)
        ctx.eps, ctx.scaling = eps, scaling
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        """Gradients of rows, norm and adapters."""
        rows, norm_weight, inner, inner_down, *weights, gate_up, activated = ctx.saved_tensors
        gate, up, down, gate_a, up_a, down_a, gate_b, up_b, down_b = weights
        needs_norm = ctx.needs_input_grad[1]
        extended = extend_with_b([gate, up], [gate_b, up_b], rows.shape[1], grad).chunk(2)
        down = whole_weight(down, (len(down_b), down_a.shape[1]), grad.dtype, grad)
        recompute, scaling = gate_up is None, ctx.scaling
        if recompute:
            normed = normed_rows(rows, norm_weight, None, ctx.eps, False)
            gate_up = recompute_gate_up(torch.cat((normed, inner), 1), *extended, grad)
        d_inner_down = grad @ down_b * scaling
        d_gate_up, recomputed = swiglu_linear_backward(
            torch.cat((grad, d_inner_down), 1), torch.cat((down, down_a)), gate_up, activated is None
        )
        activated = recomputed if activated is None else activated
        d_extended = gate_up_rows_grad(d_gate_up, *extended)
        d_normed, d_inner = d_extended.split((rows.shape[1], inner.shape[1]), 1)
        d_inner = d_inner * scaling
        d_normed = torch.addmm(d_normed, d_inner, torch.cat((gate_a, up_a)))
        d_rows, renormed, sums = norm_backward(
            [d_normed], rows, norm_weight, None, ctx.eps, grad, False, not recompute, needs_norm, False
        )
        d_gate_b, d_up_b = _b_blocks(gate_up_weights_grad(d_gate_up, inner), [gate_b, up_b])
        d_gate_a, d_up_a = (d_inner.t() @ (normed if recompute else renormed)).split((len(gate_a), len(up_a)))
        return (
            d_rows,
            *norm_grads(sums, [needs_norm], norm_weight),
            *(None,) * 6,
            d_gate_a,
            d_up_a,
            d_inner_down.t() @ activated,
            d_gate_b,
            d_up_b,
            grad.t() @ inner_down,
        )


class AdaptedNormAttention(torch.autograd.Function):
    """RMSNorm, one matrix product for queries, keys and values with their adapters, RoPE and attention."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        norm_weight: Tensor,
        eps: float,
        cos_sin: Tensor,
        cu_seqlens: Tensor,
        head_dim: int,
        max_seqlen: int,
        backend: str,
        scale: float,
        scaling: float,
        *linears: Any,
    ) -> tuple[Tensor, Tensor]:
        """``rows`` (R, W) -> the rows, for the residual, and the result of causal attention (R, heads * D).

        ``linears`` are the weights (out, W) of queries, keys and values, their biases, and their adapters' A and B;
        behind them the tensors of ``Segments.shared``.
        """
        weights, biases, a, b = (linears[start : start + 3] for start in (0, 3, 6, 9))
        shared = linears[12:]
        normed = normed_rows(rows, norm_weight, None, eps, False)
        inner = normed @ torch.cat(a).t() * scaling
        num_heads, kv_heads = (len(one) // head_dim for one in b[:2])
        ctx.num_rotary = num_heads + kv_heads
        ctx.attention = (head_dim, num_heads, max_seqlen, backend, True, scale)
        extended, weight = (
            torch.cat((normed, inner), 1),
            _qkv_weight(weights, b, rows.shape[1], head_dim, None),
        )
        bias = None if biases[0] is None else merge_qkv(biases, head_dim)
        if bias is not None and head_dim in ROPE_HEAD_DIMS:
            qkv = linear_rotate(extended, weight, bias, cos_sin, ctx.num_rotary)
        else:
            qkv = nn.functional.linear(extended, weight, bias)
            rotate(qkv, cos_sin, ctx.num_rotary, False, False)
        out, log_sum_exp = qkv_attention(qkv, cu_seqlens, shared, *ctx.attention)
        ctx.save_for_backward(
            rows, norm_weight, cos_sin, cu_seqlens, qkv, out, log_sum_exp, inner, *weights, *a, *b, *shared
        )
        ctx.eps, ctx.scaling = eps, scaling
        return rows.view_as(rows), out

    @staticmethod
    def backward(ctx: Any, residual_grad: Tensor, d_out: Tensor) -> Grads:
        """Gradients of rows, norm and adapters."""
        rows, norm_weight, cos_sin, cu_seqlens, qkv, out, log_sum_exp, inner, *linears = ctx.saved_tensors
        weights, a, b = (linears[start : start + 3] for start in (0, 3, 6))
        shared = linears[9:]
        needs_norm, head_dim = ctx.needs_input_grad[1], ctx.attention[0]
        d_qkv = qkv_attention_backward(d_out, qkv, out, log_sum_exp, cu_seqlens, shared, *ctx.attention)
        rotate(d_qkv, cos_sin, ctx.num_rotary, True, False)
        d_extended = rows_gemm(d_qkv, _qkv_weight(weights, b, rows.shape[1], head_dim, d_out))
        d_normed, d_inner = d_extended.split((rows.shape[1], inner.shape[1]), 1)
        d_inner = d_inner * ctx.scaling
        d_rows, normed, sums = norm_backward(
            [torch.addmm(d_normed, d_inner, torch.cat(a))],
            rows,
            norm_weight,
            None,
            ctx.eps,
            residual_grad,
            False,
            True,
            needs_norm,
            False,
        )
        d_b = torch.cat(split_qkv(d_qkv.t() @ inner, [len(one) for one in b], head_dim))
        d_a = (d_inner.t() @ normed).split([len(one) for one in a])
        d_norm = norm_grads(sums, [needs_norm], norm_weight)
        return d_rows, *d_norm, *(None,) * 14, *d_a, *_b_blocks(d_b, b), *(None,) * len(shared)


@torch.library.custom_op("vl3train::extend_with_b", mutates_args=())
def extend_with_b(weights: Sequence[Tensor], b: Sequence[Tensor], width: int, after: Tensor | None) -> Tensor:
    """[W | B] of several matrix products of the same rows, one below the other: (sum of out, width + sum of ranks).

    Each B has columns of its own; the rest is 0. It is one piece, so kernels that need gate above up copy nothing.
    It is an op because torch.compile would copy a concatenation within another twice, and would keep the result of the
    forward pass. In the backward pass it is not computed before ``after`` exists, the gradient that needs it (see
    recompute_linear in model/kernels/ops.py). Weights (out, width) in 4 bits come as their bytes.
    """
    result = b[0].new_empty(_extended_shape(b, width))
    result[:, width:] = 0
    for (rows, columns), weight, one in zip(_places(b), weights, b, strict=True):
        result[rows, :width] = whole_weight(weight, (len(one), width), one.dtype, after)
        result[rows, width:][:, columns] = one
    return result


@extend_with_b.register_fake
def _(weights: Sequence[Tensor], b: Sequence[Tensor], width: int, after: Tensor | None) -> Tensor:
    return b[0].new_empty(_extended_shape(b, width))


def _extended_shape(b: Sequence[Tensor], width: int) -> tuple[int, int]:
    return sum(len(one) for one in b), width + sum(one.shape[1] for one in b)


def _places(b: Sequence[Tensor]) -> list[tuple[slice, slice]]:
    """Rows of each weight, and the columns of its B, counted from the end of W's."""
    found, row, column = [], 0, 0
    for one in b:
        found.append((slice(row, row + len(one)), slice(column, column + one.shape[1])))
        row, column = row + len(one), column + one.shape[1]
    return found


def _b_blocks(columns: Tensor, b: Sequence[Tensor]) -> list[Tensor]:
    """The block of each B in the columns after W's of a tensor like that of ``extend_with_b``."""
    return [columns[place] for place in _places(b)]


def _qkv_weight(
    weights: Sequence[Tensor], b: Sequence[Tensor], width: int, head_dim: int, after: Tensor | None
) -> Tensor:
    """``extend_with_b`` for queries, keys and values, with the pairs of RoPE interleaved."""
    return merge_qkv(extend_with_b(weights, b, width, after).split([len(one) for one in b]), head_dim)
