"""Halves of a layer as functions that know their gradients: norm, products, attention or MLP, and the residual.

Only compiled layers of plain modules come here (model/layers.py): torch.compile traces these functions and fuses what
lies between their products; the passes that it does not make by itself are ops of model/fused.py. R rows, W values a
row.

A bias is *handed over* where its gradient falls off as column sums of a pass that reads the rows anyway: the product
takes it detached, and the function whose kernel sums those columns takes it for its gradient alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vl3train.model.fused import gelu_backward, linear_again, norm_backward, rotate
from vl3train.model.qkv_attention import qkv_attention, qkv_attention_backward

Grads = tuple[Tensor | None, ...]


def normed_rows(rows: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> Tensor:
    """LayerNorm where ``centred``, else RMSNorm as transformers rounds it."""
    if centred:
        return F.layer_norm(rows, weight.shape, weight, bias, eps)
    x = rows.float()
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(rows.dtype)


class NormAttention(torch.autograd.Function):
    """Norm, one product for queries, keys and values, RoPE and attention; the rows come out for the residual."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        cu_seqlens: Tensor,
        head_dim: int,
        max_seqlen: int,
        backend: str,
        causal: bool,
        scale: float,
        *linears: Any,
    ) -> tuple[Tensor, Tensor]:
        """(R, W) rows -> the rows, and attention's (R, heads * D) result.

        ``linears`` are the weights (out, W) of the three products, then their biases, all or none of them. A causal
        language model has an RMSNorm (``norm_bias`` None), the encoder a LayerNorm.
        """
        weights, biases = linears[:3], linears[3:]
        normed = normed_rows(rows, norm_weight, norm_bias, eps, norm_bias is not None)
        qkv = F.linear(normed, torch.cat(weights), None if biases[0] is None else torch.cat(biases))
        num_heads, kv_heads = (len(weight) // head_dim for weight in weights[:2])
        ctx.rotated, ctx.of_attention = (
            num_heads + kv_heads,
            (head_dim, num_heads, max_seqlen, backend, causal, scale),
        )
        rotate(qkv, cos, sin, ctx.rotated, False)
        out, log_sum_exp = qkv_attention(qkv, cu_seqlens, *ctx.of_attention)
        ctx.save_for_backward(
            rows, norm_weight, norm_bias, cos, sin, cu_seqlens, qkv, out, log_sum_exp, *weights
        )
        ctx.eps = eps
        return rows.view_as(rows), out

    @staticmethod
    def backward(ctx: Any, residual_grad: Tensor, d_out: Tensor) -> Grads:
        """Gradients of rows, norm, weights and biases."""
        saved = ctx.saved_tensors
        rows, norm_weight, norm_bias, cos, sin, cu_seqlens, qkv, out, log_sum_exp, *weights = saved
        of_norm, of_linears = ctx.needs_input_grad[1:3], ctx.needs_input_grad[12:]
        d_qkv = qkv_attention_backward(d_out, qkv, out, log_sum_exp, cu_seqlens, *ctx.of_attention)
        bias_sums = rotate(d_qkv, cos, sin, ctx.rotated, True)
        d_rows, normed, sums = norm_backward(
            [d_qkv @ torch.cat(weights)],
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
            d_linears[:3] = (d_qkv.t() @ normed).split(widths)
        if any(of_linears[3:]):
            d_linears[3:] = bias_sums.to(rows.dtype).split(widths)
        wanted = (d if of else None for d, of in zip(d_linears, of_linears, strict=True))
        return d_rows, *_norm_grads(sums, of_norm, norm_weight), *(None,) * 9, *wanted


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
        return d_rows, *_norm_grads(sums, of_norm, norm_weight), None, *d_weights, *d_biases


class GeluMlp(torch.autograd.Function):
    """The encoder's LayerNorm, MLP and residual."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        bias_in: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        again: bool,
        wide_weight: Tensor,
        wide_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> Tensor:
        """(R, W) rows -> (R, W).

        ``wide_weight`` (I, W) and ``weight`` (W, I). Handed over is ``bias_in``, which was added to every row. Of the
        (R, I) rows nothing is kept but what GELU takes, and ``again`` computes that again, too.
        """
        normed = normed_rows(rows, norm_weight, norm_bias, eps, True)
        wide = F.linear(normed, wide_weight, wide_bias)
        kept = None if again else wide
        ctx.save_for_backward(rows, norm_weight, norm_bias, wide_weight, wide_bias, weight, kept)
        ctx.eps = eps
        return rows + F.linear(F.gelu(wide, approximate="tanh"), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        """Gradients of the tensors, in their order."""
        rows, norm_weight, norm_bias, wide_weight, wide_bias, weight, wide = ctx.saved_tensors
        _, of_in, *of_norm, _, _, of_wide, of_wide_bias, of_weight, of_bias = ctx.needs_input_grad
        again = wide is None
        if again:
            normed = normed_rows(rows, norm_weight, norm_bias, ctx.eps, True)
            wide = linear_again(normed, wide_weight, wide_bias, grad)
        d_wide = grad @ weight
        activated, wide_sums = gelu_backward(d_wide, wide)
        d_rows, made, sums = norm_backward(
            [d_wide @ wide_weight],
            rows,
            norm_weight,
            norm_bias,
            ctx.eps,
            grad,
            True,
            of_wide and not again,
            any(of_norm),
            of_in or of_bias,
        )
        # cuBLAS has a better kernel for the turned gradient: 0.64 ms against 0.86 for 49 152 rows from 1152 to 4304
        # wide (H100).
        d_wide_weight = ((normed if again else made).t() @ d_wide).t() if of_wide else None
        return (
            d_rows,
            sums[-2].to(rows.dtype) if of_in else None,
            *_norm_grads(sums, of_norm, norm_weight),
            None,
            None,
            d_wide_weight,
            wide_sums.to(rows.dtype) if of_wide_bias else None,
            grad.t() @ activated if of_weight else None,
            sums[-1].to(rows.dtype) if of_bias else None,
        )


class SwigluMlp(torch.autograd.Function):
    """The language model's RMSNorm, MLP and residual."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        norm_weight: Tensor,
        eps: float,
        again: bool,
        gate_weight: Tensor,
        up_weight: Tensor,
        weight: Tensor,
    ) -> Tensor:
        """(R, W) rows -> (R, W); ``gate_weight`` and ``up_weight`` (I, W), ``weight`` (W, I); ``again`` as above."""
        normed = normed_rows(rows, norm_weight, None, eps, False)
        gate, up = F.linear(normed, gate_weight), F.linear(normed, up_weight)
        kept = (None, None) if again else (gate, up)
        ctx.save_for_backward(rows, norm_weight, gate_weight, up_weight, weight, *kept)
        ctx.eps = eps
        return rows + F.linear(F.silu(gate) * up, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        """Gradients of the tensors, in their order."""
        rows, norm_weight, gate_weight, up_weight, weight, gate, up = ctx.saved_tensors
        _, of_norm, _, _, of_gate, of_up, of_weight = ctx.needs_input_grad
        again = gate is None
        if again:
            normed = normed_rows(rows, norm_weight, None, ctx.eps, False)
            gate = linear_again(normed, gate_weight, None, grad)
            up = linear_again(normed, up_weight, None, grad)
        d_activated, x = (grad @ weight).float(), gate.float()
        share = torch.sigmoid(x)
        activated = (x * share * up).to(rows.dtype)
        d_up = (d_activated * x * share).to(rows.dtype)
        d_gate = (d_activated * up * share * (1 + x * (1 - share))).to(rows.dtype)
        d_rows, made, sums = norm_backward(
            [d_gate @ gate_weight, d_up @ up_weight],
            rows,
            norm_weight,
            None,
            ctx.eps,
            grad,
            False,
            (of_gate or of_up) and not again,
            of_norm,
            False,
        )
        normed = normed if again else made
        return (
            d_rows,
            sums[0].to(norm_weight.dtype) if of_norm else None,
            None,
            None,
            d_gate.t() @ normed if of_gate else None,
            d_up.t() @ normed if of_up else None,
            grad.t() @ activated if of_weight else None,
        )


def _norm_grads(sums: Tensor, wanted: Any, weight: Tensor) -> Grads:
    """Gradients of a norm's weight and bias, where they are wanted, from norm_backward's sums."""
    return tuple(sums[place].to(weight.dtype) if of else None for place, of in enumerate(wanted))
