"""The second half of a layer as functions that know their gradients: norm, MLP and the residual.

Only compiled layers of plain modules come here (model/layers/layers.py). With ``products`` quack the ops of
model/kernels/gemm_ops.py make the products and the passes between them; else torch.compile traces these functions,
fuses what lies between cuBLAS's products, and the passes that it does not make by itself are ops of
model/kernels/ops.py. R rows, W values a row.

A bias is *handed over* where its gradient falls off as column sums of a pass that reads the rows anyway: the product
takes it detached, and the function whose kernel sums those columns takes it for its gradient alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vl3train.model.kernels.gemm_accumulate import add_gate_up_weights_grad, add_weight_grad
from vl3train.model.kernels.gemm_ops import (
    gate_up_rows_grad,
    gate_up_weights_grad,
    gelu_linear_backward,
    linear_add,
    linear_gelu,
    linear_swiglu,
    recompute_gate_up,
    rows_gemm,
    swiglu_linear_backward,
)
from vl3train.model.kernels.ops import gelu_backward, norm_backward, norm_grads, normed_rows, recompute_linear

Grads = tuple[Tensor | None, ...]


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
        level: str,
        quack: bool,
        intermediate_weight: Tensor,
        intermediate_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> Tensor:
        """(R, W) rows -> (R, W).

        ``intermediate_weight`` (I, W), ``weight`` (W, I). Handed over is ``bias_in``, which was added to every row.
        Of the (R, I) rows what GELU takes alone is kept, at ``level`` mlp not even that, and at nothing what it
        gives, too, where one of quack's products gives it: the compiler would make it again.
        """
        normed = normed_rows(rows, norm_weight, norm_bias, eps, True)
        if quack:
            intermediate, activated = linear_gelu(
                normed, intermediate_weight, intermediate_bias, level != "mlp"
            )
            result = linear_add(activated, weight, bias, rows)
        else:
            intermediate = F.linear(normed, intermediate_weight, intermediate_bias)
            activated = F.gelu(intermediate, approximate="tanh")
            result = rows + F.linear(activated, weight, bias)
        kept = None if level == "mlp" else intermediate, activated if quack and level == "nothing" else None
        ctx.save_for_backward(
            rows, norm_weight, norm_bias, intermediate_weight, intermediate_bias, weight, *kept
        )
        ctx.eps, ctx.quack = eps, quack
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        """Gradients of the tensors, in their order."""
        (
            rows,
            norm_weight,
            norm_bias,
            intermediate_weight,
            intermediate_bias,
            weight,
            intermediate,
            activated,
        ) = ctx.saved_tensors
        _, of_in, *of_norm, _, _, _, of_intermediate, of_intermediate_bias, of_weight, of_bias = (
            ctx.needs_input_grad
        )
        recompute = intermediate is None
        if recompute:
            normed = normed_rows(rows, norm_weight, norm_bias, ctx.eps, True)
            intermediate = recompute_linear(normed, intermediate_weight, intermediate_bias, grad)
        if ctx.quack:
            d_intermediate, made, intermediate_sums = gelu_linear_backward(
                grad, weight, intermediate, of_weight and activated is None
            )
            activated = made if activated is None else activated
        else:
            d_intermediate = grad @ weight
            activated, intermediate_sums = gelu_backward(d_intermediate, intermediate)
        d_rows, made, sums = norm_backward(
            [
                rows_gemm(d_intermediate, intermediate_weight)
                if ctx.quack
                else d_intermediate @ intermediate_weight
            ],
            rows,
            norm_weight,
            norm_bias,
            ctx.eps,
            grad,
            True,
            of_intermediate and not recompute,
            any(of_norm),
            of_in or of_bias,
        )
        # cuBLAS has a better kernel for the turned gradient: 0.64 ms against 0.86 for 49 152 rows from 1152 to 4304
        # wide (H100).
        d_intermediate_weight = (
            ((normed if recompute else made).t() @ d_intermediate).t() if of_intermediate else None
        )
        return (
            d_rows,
            sums[-2].to(rows.dtype) if of_in else None,
            *norm_grads(sums, of_norm, norm_weight),
            None,
            None,
            None,
            d_intermediate_weight,
            intermediate_sums.to(rows.dtype) if of_intermediate_bias else None,
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
        level: str,
        quack: bool,
        gate_weight: Tensor,
        up_weight: Tensor,
        weight: Tensor,
        *sums: Tensor,
    ) -> Tensor:
        """(R, W) rows -> (R, W); ``gate_weight`` and ``up_weight`` (I, W), ``weight`` (W, I); ``level`` as above.

        ``sums`` are none, or those of gate's and up's gradients (2 I, W) and of ``weight``'s (W, I), which the ops of
        model/kernels/gemm_accumulate.py add to.
        """
        normed = normed_rows(rows, norm_weight, None, eps, False)
        intermediate: tuple[Tensor, ...]
        if quack:
            gate_up, activated = linear_swiglu(normed, gate_weight, up_weight, level != "mlp")
            intermediate = (gate_up,)
        else:
            intermediate = gate, up = F.linear(normed, gate_weight), F.linear(normed, up_weight)
            activated = F.silu(gate) * up
        ctx.num_sums = len(sums)
        ctx.recompute = level == "mlp"  # of torch 2.11's tracer one may not ask whether a tuple is empty
        kept = () if ctx.recompute else intermediate
        of_weight = activated if quack and level == "nothing" else None
        ctx.save_for_backward(rows, norm_weight, gate_weight, up_weight, weight, of_weight, *sums, *kept)
        ctx.eps, ctx.quack = eps, quack
        return linear_add(activated, weight, None, rows) if quack else rows + F.linear(activated, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        """Gradients of the tensors, in their order."""
        rows, norm_weight, gate_weight, up_weight, weight, activated, *kept = ctx.saved_tensors
        of_weights, intermediate = kept[: ctx.num_sums], kept[ctx.num_sums :]
        _, of_norm, _, _, _, of_gate, of_up, of_weight = ctx.needs_input_grad[:8]
        recompute = ctx.recompute
        normed = normed_rows(rows, norm_weight, None, ctx.eps, False) if recompute else None
        weights = gate_weight, up_weight, weight
        if ctx.quack:
            recomputed, d_normed, weight_grads = _back_through_quack(
                grad, normed, *weights, intermediate, of_weights, of_weight and activated is None
            )
            activated = recomputed if activated is None else activated
        else:
            activated, d_normed, weight_grads = _back_through_torch(grad, normed, *weights, intermediate)
        d_rows, made, sums = norm_backward(
            d_normed,
            rows,
            norm_weight,
            None,
            ctx.eps,
            grad,
            False,
            (of_gate or of_up) and not recompute,
            of_norm,
            False,
        )
        d_gate, d_up = weight_grads(made if normed is None else normed) if of_gate or of_up else (None, None)
        if of_weights:
            add_weight_grad(of_weights[1], grad, activated)
        return (
            d_rows,
            sums[0].to(norm_weight.dtype) if of_norm else None,
            None,
            None,
            None,
            d_gate if of_gate else None,
            d_up if of_up else None,
            grad.t() @ activated if of_weight and not of_weights else None,
            *(None,) * len(of_weights),
        )


Back = tuple[Tensor, list[Tensor], Callable[[Tensor], tuple[Tensor | None, ...]]]
"""What the last product took, the gradients of the normed rows to be added up, and what gives those of gate's and up's
weights, from the normed rows, or adds them to their sums."""


def _back_through_quack(
    grad: Tensor,
    normed: Tensor | None,
    gate_weight: Tensor,
    up_weight: Tensor,
    weight: Tensor,
    intermediate: list[Tensor],
    of_weights: list[Tensor],
    recompute_activated: bool,
) -> Back:
    """``wide`` is gate_up, or empty, and is made again of ``normed``; ``of_weights`` are sums, or none. What the last
    product took is left empty if not ``recompute_activated``."""
    gate_up = intermediate[0] if normed is None else recompute_gate_up(normed, gate_weight, up_weight, grad)
    d_gate_up, activated = swiglu_linear_backward(grad, weight, gate_up, recompute_activated)
    d_normed = gate_up_rows_grad(d_gate_up, gate_weight, up_weight)

    def weight_grads(rows: Tensor) -> tuple[Tensor | None, ...]:
        if not of_weights:
            return gate_up_weights_grad(d_gate_up, rows).chunk(2)
        add_gate_up_weights_grad(of_weights[0], d_gate_up, rows)
        return None, None

    return activated, [d_normed], weight_grads


def _back_through_torch(
    grad: Tensor,
    normed: Tensor | None,
    gate_weight: Tensor,
    up_weight: Tensor,
    weight: Tensor,
    intermediate: list[Tensor],
) -> Back:
    """``wide`` are gate and up, or empty."""
    if normed is not None:
        intermediate = [recompute_linear(normed, one, None, grad) for one in (gate_weight, up_weight)]
    gate, up = intermediate
    d_activated, x = (grad @ weight).float(), gate.float()
    share = torch.sigmoid(x)
    activated = (x * share * up).to(grad.dtype)
    d_up = (d_activated * x * share).to(grad.dtype)
    d_gate = (d_activated * up * share * (1 + x * (1 - share))).to(grad.dtype)
    d_normed = [d_gate @ gate_weight, d_up @ up_weight]
    return activated, d_normed, lambda rows: (d_gate.t() @ rows, d_up.t() @ rows)
