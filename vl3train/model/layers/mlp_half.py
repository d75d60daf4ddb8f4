"""The second half of a layer as autograd functions: norm, MLP and the residual.

Only compiled layers of plain modules use them (model/layers/layers.py). With ``quack`` the ops of
model/kernels/gemm_ops.py compute the matrix products and the elementwise work between them. Else torch.compile traces
these functions and fuses the elementwise work between cuBLAS's products; what it cannot fuse are ops of
model/kernels/ops.py. R rows, W the hidden_size, I the intermediate_size.

The bias of the product before the norm (``bias_in``) has a gradient that is the column sums of ``d_rows``, which the
norm's backward pass has at hand. So that product takes the bias detached, and the function here returns its gradient.

``forward`` takes many plain arguments: torch.autograd.Function looks for tensors among the arguments only.
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
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
    ) -> Tensor:
        """``rows`` (R, W) -> (R, W).

        ``fc1_weight`` (I, W), ``fc2_weight`` (W, I). ``bias_in`` was added to every row before; here it only gets its
        gradient. Of the (R, I) rows GELU's input is kept, at ``level`` mlp nothing, and at nothing GELU's output too
        where quack computes it (torch.compile would recompute it).
        """
        normed = normed_rows(rows, norm_weight, norm_bias, eps, True)
        if quack:
            intermediate, activated = linear_gelu(normed, fc1_weight, fc1_bias, level != "mlp")
            result = linear_add(activated, fc2_weight, fc2_bias, rows)
        else:
            intermediate = F.linear(normed, fc1_weight, fc1_bias)
            activated = F.gelu(intermediate, approximate="tanh")
            result = rows + F.linear(activated, fc2_weight, fc2_bias)
        kept = None if level == "mlp" else intermediate, activated if quack and level == "nothing" else None
        ctx.save_for_backward(rows, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, *kept)
        ctx.eps, ctx.quack = eps, quack
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        """Gradients of the tensors, in their order."""
        rows, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, *kept = ctx.saved_tensors
        intermediate, activated = kept
        _, needs_bias_in, *needs_norm, _, _, _, needs_fc1, needs_fc1_bias, needs_fc2, needs_fc2_bias = (
            ctx.needs_input_grad
        )
        recompute = intermediate is None
        if recompute:
            normed = normed_rows(rows, norm_weight, norm_bias, ctx.eps, True)
            intermediate = recompute_linear(normed, fc1_weight, fc1_bias, grad)
        if ctx.quack:
            d_intermediate, recomputed, fc1_bias_sums = gelu_linear_backward(
                grad, fc2_weight, intermediate, needs_fc2 and activated is None
            )
            activated = recomputed if activated is None else activated
            d_normed = rows_gemm(d_intermediate, fc1_weight)
        else:
            d_intermediate = grad @ fc2_weight
            activated, fc1_bias_sums = gelu_backward(d_intermediate, intermediate)
            d_normed = d_intermediate @ fc1_weight
        d_rows, recomputed, sums = norm_backward(
            [d_normed],
            rows,
            norm_weight,
            norm_bias,
            ctx.eps,
            grad,
            True,
            needs_fc1 and not recompute,
            any(needs_norm),
            needs_bias_in or needs_fc2_bias,
        )
        # cuBLAS has a better kernel for the transposed gradient: 0.64 ms, not 0.86, for 49 152 rows of the encoder's
        # sizes (H100).
        normed = normed if recompute else recomputed
        d_fc1 = (normed.t() @ d_intermediate).t() if needs_fc1 else None
        return (
            d_rows,
            sums[-2].to(rows.dtype) if needs_bias_in else None,
            *norm_grads(sums, needs_norm, norm_weight),
            None,
            None,
            None,
            d_fc1,
            fc1_bias_sums.to(rows.dtype) if needs_fc1_bias else None,
            grad.t() @ activated if needs_fc2 else None,
            sums[-1].to(rows.dtype) if needs_fc2_bias else None,
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
        down_weight: Tensor,
        *sums: Tensor,
    ) -> Tensor:
        """``rows`` (R, W) -> (R, W).

        ``gate_weight`` and ``up_weight`` (I, W), ``down_weight`` (W, I); ``level`` as above. ``sums`` are none, or two
        float32 sums: of the gradients of gate and up (2 I, W), and of that of down (W, I). The ops of
        model/kernels/gemm_accumulate.py add to them.
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
        ctx.recompute = (
            level == "mlp"
        )  # a flag, because torch 2.11's tracer cannot ask whether a tuple is empty
        kept = () if ctx.recompute else intermediate
        kept_activated = activated if quack and level == "nothing" else None
        weights = gate_weight, up_weight, down_weight
        ctx.save_for_backward(rows, norm_weight, *weights, kept_activated, *sums, *kept)
        ctx.eps, ctx.quack = eps, quack
        if quack:
            return linear_add(activated, down_weight, None, rows)
        return rows + F.linear(activated, down_weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        """Gradients of the tensors, in their order."""
        rows, norm_weight, gate_weight, up_weight, down_weight, activated, *kept = ctx.saved_tensors
        grad_sums, intermediate = kept[: ctx.num_sums], kept[ctx.num_sums :]
        _, needs_norm, _, _, _, needs_gate, needs_up, needs_down = ctx.needs_input_grad[:8]
        recompute = ctx.recompute
        normed = normed_rows(rows, norm_weight, None, ctx.eps, False) if recompute else None
        weights = gate_weight, up_weight, down_weight
        if ctx.quack:
            recomputed, d_normed, weight_grads = _backward_with_quack(
                grad, normed, *weights, intermediate, grad_sums, needs_down and activated is None
            )
            activated = recomputed if activated is None else activated
        else:
            activated, d_normed, weight_grads = _backward_with_torch(grad, normed, *weights, intermediate)
        d_rows, renormed, sums = norm_backward(
            d_normed,
            rows,
            norm_weight,
            None,
            ctx.eps,
            grad,
            False,
            (needs_gate or needs_up) and not recompute,
            needs_norm,
            False,
        )
        d_gate, d_up = None, None
        if needs_gate or needs_up:
            d_gate, d_up = weight_grads(renormed if normed is None else normed)
        if grad_sums:
            add_weight_grad(grad_sums[1], grad, activated)
        return (
            d_rows,
            sums[0].to(norm_weight.dtype) if needs_norm else None,
            None,
            None,
            None,
            d_gate if needs_gate else None,
            d_up if needs_up else None,
            grad.t() @ activated if needs_down and not grad_sums else None,
            *(None,) * len(grad_sums),
        )


MlpBackward = tuple[Tensor, list[Tensor], Callable[[Tensor], tuple[Tensor | None, ...]]]
"""The input of the down projection (R, I), gradients of the normed rows (R, W), whose sum counts, and a function of the
normed rows: it returns the gradients of the weights of gate and up, or adds them to their sums and returns None twice.
"""


def _backward_with_quack(
    grad: Tensor,
    normed: Tensor | None,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    intermediate: list[Tensor],
    grad_sums: list[Tensor],
    recompute_activated: bool,
) -> MlpBackward:
    """``intermediate`` is [gate_up], or empty where it is recomputed from ``normed``.

    Without ``recompute_activated`` the input of the down projection is empty.
    """
    gate_up = intermediate[0] if normed is None else recompute_gate_up(normed, gate_weight, up_weight, grad)
    d_gate_up, activated = swiglu_linear_backward(grad, down_weight, gate_up, recompute_activated)
    d_normed = gate_up_rows_grad(d_gate_up, gate_weight, up_weight)

    def weight_grads(rows: Tensor) -> tuple[Tensor | None, ...]:
        if not grad_sums:
            return gate_up_weights_grad(d_gate_up, rows).chunk(2)
        add_gate_up_weights_grad(grad_sums[0], d_gate_up, rows)
        return None, None

    return activated, [d_normed], weight_grads


def _backward_with_torch(
    grad: Tensor,
    normed: Tensor | None,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    intermediate: list[Tensor],
) -> MlpBackward:
    """``intermediate`` are [gate, up], or empty where they are recomputed from ``normed``."""
    if normed is not None:
        intermediate = [recompute_linear(normed, weight, None, grad) for weight in (gate_weight, up_weight)]
    gate, up = intermediate
    d_activated, x = (grad @ down_weight).float(), gate.float()
    sigmoid = torch.sigmoid(x)
    activated = (x * sigmoid * up).to(grad.dtype)
    d_up = (d_activated * x * sigmoid).to(grad.dtype)
    d_gate = (d_activated * up * sigmoid * (1 + x * (1 - sigmoid))).to(grad.dtype)
    d_normed = [d_gate @ gate_weight, d_up @ up_weight]
    return activated, d_normed, lambda rows: (d_gate.t() @ rows, d_up.t() @ rows)
