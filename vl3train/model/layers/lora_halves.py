"""Halves of a language model's layer whose weights are frozen and carry LoRA adapters, as functions with gradients.

An adapter adds scaling * (x A^T) B^T to a product x W^T. Here it rides in the same product: [x | u] [W | B]^T, with u =
scaling * x A^T. So no rows as wide as the product's are written, read and added up beside it, forward or back, and what
follows a product (RoPE, SwiGLU, residuals) stays within it. W is copied next to B for it, which takes as long as some
200 rows of the product. Compiled layers come here (model/layers/lora_dispatch.py), with the ops of
model/kernels/gemm_ops.py.

R rows, W values a row, I of the MLP's wide rows, r the adapters' rank. https://arxiv.org/abs/2106.09685, section 4.1
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vl3train.model.attention.qkv_op import qkv_attention, qkv_attention_backward
from vl3train.model.kernels.gemm_ops import (
    ROTATED_HEADS,
    gate_up_rows_grad,
    gate_up_weights_grad,
    linear_add,
    linear_rotate,
    linear_swiglu,
    recompute_gate_up,
    rows_gemm,
    swiglu_linear_backward,
)
from vl3train.model.kernels.ops import norm_backward, norm_grads, normed_rows, rotate
from vl3train.model.layers.attention_half import Grads, merged, parted


class AdaptedSwigluMlp(torch.autograd.Function):
    """The language model's RMSNorm, MLP with adapters on its three products, and the residual."""

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
        """(R, W) rows -> (R, W).

        ``gate`` and ``up`` (I, W), ``down`` (W, I), then each one's A and B. Of the (R, I) rows ``gate_up`` alone is
        kept, at ``level`` mlp not even that, and at nothing what SwiGLU gives, too.
        """
        normed = normed_rows(rows, norm_weight, None, eps, False)
        inner = normed @ torch.cat((gate_a, up_a)).t() * scaling
        intermediate = beside([gate, up], [gate_b, up_b], None).chunk(2)
        gate_up, activated = linear_swiglu(torch.cat((normed, inner), 1), *intermediate, level != "mlp")
        inner_down = activated @ down_a.t() * scaling
        result = linear_add(activated, down, None, torch.addmm(rows, inner_down, down_b.t()))
        of_weights = gate, up, down, gate_a, up_a, down_a, gate_b, up_b, down_b
        kept = None if level == "mlp" else gate_up, activated if level == "nothing" else None
        ctx.save_for_backward(rows, norm_weight, inner, inner_down, *of_weights, *kept)
        ctx.eps, ctx.scaling = eps, scaling
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        """Gradients of rows, norm and adapters."""
        rows, norm_weight, inner, inner_down, *of_weights, gate_up, activated = ctx.saved_tensors
        gate, up, down, gate_a, up_a, down_a, gate_b, up_b, down_b = of_weights
        of_norm = ctx.needs_input_grad[1]
        intermediate, recompute, scaling = (
            beside([gate, up], [gate_b, up_b], grad).chunk(2),
            gate_up is None,
            ctx.scaling,
        )
        if recompute:
            normed = normed_rows(rows, norm_weight, None, ctx.eps, False)
            gate_up = recompute_gate_up(torch.cat((normed, inner), 1), *intermediate, grad)
        d_inner_down = grad @ down_b * scaling
        d_gate_up, recompute_activated = swiglu_linear_backward(
            torch.cat((grad, d_inner_down), 1), torch.cat((down, down_a)), gate_up, activated is None
        )
        activated = recompute_activated if activated is None else activated
        d_normed, d_inner = gate_up_rows_grad(d_gate_up, *intermediate).split(
            (rows.shape[1], inner.shape[1]), 1
        )
        d_inner = d_inner * scaling
        d_normed = torch.addmm(d_normed, d_inner, torch.cat((gate_a, up_a)))
        d_rows, made, sums = norm_backward(
            [d_normed], rows, norm_weight, None, ctx.eps, grad, False, not recompute, of_norm, False
        )
        d_gate_b, d_up_b = _blocks(gate_up_weights_grad(d_gate_up, inner), [gate, up], [gate_b, up_b])
        d_gate_a, d_up_a = (d_inner.t() @ (normed if recompute else made)).split((len(gate_a), len(up_a)))
        return (
            d_rows,
            *norm_grads(sums, [of_norm], norm_weight),
            *(None,) * 6,
            d_gate_a,
            d_up_a,
            d_inner_down.t() @ activated,
            d_gate_b,
            d_up_b,
            grad.t() @ inner_down,
        )


class AdaptedNormAttention(torch.autograd.Function):
    """RMSNorm, queries, keys and values with adapters from one product, RoPE and attention; the rows come out, too."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        norm_weight: Tensor,
        eps: float,
        table: Tensor,
        cu_seqlens: Tensor,
        head_dim: int,
        max_seqlen: int,
        backend: str,
        scale: float,
        scaling: float,
        *linears: Any,
    ) -> tuple[Tensor, Tensor]:
        """(R, W) rows -> the rows, and causal attention's (R, heads * D) result.

        ``linears`` are the weights (out, W) of the three products, their biases, and their adapters' A and B.
        """
        weights, biases, a, b = (linears[start : start + 3] for start in (0, 3, 6, 9))
        normed = normed_rows(rows, norm_weight, None, eps, False)
        inner = normed @ torch.cat(a).t() * scaling
        num_heads, kv_heads = (len(weight) // head_dim for weight in weights[:2])
        ctx.rotated = num_heads + kv_heads
        ctx.of_attention = (head_dim, num_heads, max_seqlen, backend, True, scale)
        intermediate_rows, weight, bias = (
            torch.cat((normed, inner), 1),
            _qkv_weight(weights, b, head_dim, None),
            None,
        )
        if biases[0] is not None:
            bias = merged(biases, head_dim)
        if bias is not None and head_dim in ROTATED_HEADS:
            qkv = linear_rotate(intermediate_rows, weight, bias, table, ctx.rotated)
        else:
            qkv = nn.functional.linear(intermediate_rows, weight, bias)
            rotate(qkv, table, ctx.rotated, False, False)
        out, log_sum_exp = qkv_attention(qkv, cu_seqlens, *ctx.of_attention)
        ctx.save_for_backward(
            rows, norm_weight, table, cu_seqlens, qkv, out, log_sum_exp, inner, *weights, *a, *b
        )
        ctx.eps, ctx.scaling = eps, scaling
        return rows.view_as(rows), out

    @staticmethod
    def backward(ctx: Any, residual_grad: Tensor, d_out: Tensor) -> Grads:
        """Gradients of rows, norm and adapters."""
        rows, norm_weight, table, cu_seqlens, qkv, out, log_sum_exp, inner, *linears = ctx.saved_tensors
        weights, a, b = (linears[start : start + 3] for start in (0, 3, 6))
        of_norm, head_dim = ctx.needs_input_grad[1], ctx.of_attention[0]
        d_qkv = qkv_attention_backward(d_out, qkv, out, log_sum_exp, cu_seqlens, *ctx.of_attention)
        rotate(d_qkv, table, ctx.rotated, True, False)
        d_intermediate = rows_gemm(d_qkv, _qkv_weight(weights, b, head_dim, d_out))
        d_normed, d_inner = d_intermediate.split((rows.shape[1], inner.shape[1]), 1)
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
            of_norm,
            False,
        )
        d_merged = torch.cat(parted(d_qkv.t() @ inner, [len(weight) for weight in weights], head_dim))
        d_a = (d_inner.t() @ normed).split([len(one) for one in a])
        of_rows = d_rows, *norm_grads(sums, [of_norm], norm_weight)
        return *of_rows, *(None,) * 14, *d_a, *_blocks(d_merged, weights, b)


@torch.library.custom_op("vl3train::beside", mutates_args=())
def beside(weights: Sequence[Tensor], b: Sequence[Tensor], after: Tensor | None) -> Tensor:
    """[W | B] of several products of the same rows, one below the other; each has columns of its own for its B.

    (sum of out, W + sum of ranks), in one piece: the kernels for two halves take it without a copy. An op because the
    compiler would copy a concatenation within another twice, and never before ``after``, the gradient that asks for it:
    it would keep what the forward pass made (see recompute_linear in model/kernels/ops.py).
    """
    del after
    width = weights[0].shape[1]
    result = weights[0].new_empty(_beside_shape(weights, b))
    result[:, width:] = 0
    for (rows, columns), weight, one in zip(_places(weights, b), weights, b, strict=True):
        result[rows, :width] = weight
        result[rows, width:][:, columns] = one
    return result


@beside.register_fake
def _(weights: Sequence[Tensor], b: Sequence[Tensor], after: Tensor | None) -> Tensor:
    return weights[0].new_empty(_beside_shape(weights, b))


def _beside_shape(weights: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[int, int]:
    return sum(len(weight) for weight in weights), weights[0].shape[1] + sum(one.shape[1] for one in b)


def _places(weights: Sequence[Tensor], b: Sequence[Tensor]) -> list[tuple[slice, slice]]:
    """Rows of each weight, and the columns of its B behind those of W."""
    found, row, column = [], 0, 0
    for weight, one in zip(weights, b, strict=True):
        found.append((slice(row, row + len(weight)), slice(column, column + one.shape[1])))
        row, column = row + len(weight), column + one.shape[1]
    return found


def _blocks(of_columns: Tensor, weights: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """Of the columns behind W of what has ``beside``'s shape, the part of each B."""
    return [of_columns[place] for place in _places(weights, b)]


def _qkv_weight(
    weights: Sequence[Tensor], b: Sequence[Tensor], head_dim: int, after: Tensor | None
) -> Tensor:
    """``beside`` for queries, keys and values, with the pairs that RoPE turns together."""
    return merged(beside(weights, b, after).split([len(weight) for weight in weights]), head_dim)
