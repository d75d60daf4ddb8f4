"""Norm and GELU with the products that read them, their gradients in as few passes over memory as they need.

torch.compile fuses the forward by itself. In the backward it reads each row of a norm twice, writes the normed rows
in a pass of their own and sums each bias's gradient in another. Only compiled layers of plain modules come here
(model/layers.py). R rows, W values a row.

A bias is *handed over* where its gradient falls off as column sums of a pass that reads the rows anyway: the product
takes it detached, and the function whose kernel sums those columns takes it for its gradient alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("vl3train::norm_backward", mutates_args=())
def norm_backward(
    grads: list[Tensor],
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual_grad: Tensor | None,
    centred: bool,
    normed_again: bool,
    weight_sums: bool,
    row_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of (R, W) ``rows`` that LayerNorm (``centred``) or RMSNorm normed, all arithmetic in float32.

    ``grads`` are 1 to 3 gradients of the normed rows, to be added up; ``residual_grad`` is what the rows got past
    the norm, added to the result. Gives (R, W) d_rows, the (R, W) normed rows again (``normed_again``, else empty),
    and (number, W) float32 sums over the rows in this order: with ``weight_sums`` the gradients of ``weight`` and of
    ``bias`` if there is one, with ``row_sums`` the sums of d_rows and of ``residual_grad`` if there is one.
    """
    arguments = (grads, rows, weight, bias, eps, residual_grad, centred, normed_again, weight_sums, row_sums)
    if rows.is_cuda:
        from vl3train.model.norm_kernels import norm_backward_kernel

        return norm_backward_kernel(*arguments)
    return plain_norm_backward(*arguments)


@norm_backward.register_fake
def _(
    grads: list[Tensor],
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual_grad: Tensor | None,
    centred: bool,
    normed_again: bool,
    weight_sums: bool,
    row_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    width = rows.shape[1]
    num_sums = weight_sums * (1 + (bias is not None)) + row_sums * (1 + (residual_grad is not None))
    return (
        rows.new_empty(rows.shape),
        rows.new_empty(rows.shape if normed_again else (0, width)),
        rows.new_empty((num_sums, width), dtype=torch.float32),
    )


def plain_norm_backward(
    grads: Sequence[Tensor],
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual_grad: Tensor | None,
    centred: bool,
    normed_again: bool,
    weight_sums: bool,
    row_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``norm_backward`` in torch's own ops: for the CPU, and what the kernel is measured against."""
    x = rows.float()
    if centred:
        x = x - x.mean(-1, keepdim=True)
    rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    x = x * rstd
    grad = sum((g.float() for g in grads[1:]), start=grads[0].float())
    sums = []
    if weight_sums:
        sums += [(grad * x).sum(0)] + ([] if bias is None else [grad.sum(0)])
    grad = grad * weight.float()
    d_rows = grad - x * (grad * x).mean(-1, keepdim=True)
    if centred:
        d_rows = d_rows - grad.mean(-1, keepdim=True)
    d_rows = d_rows * rstd
    if residual_grad is not None:
        d_rows = d_rows + residual_grad.float()
    if row_sums:
        sums += [d_rows.sum(0)] + ([] if residual_grad is None else [residual_grad.float().sum(0)])
    normed = x.new_empty((0, x.shape[1]))
    if normed_again:
        normed = x * weight.float() + (0 if bias is None else bias.float())
    stacked = torch.stack(sums) if sums else x.new_empty((0, x.shape[1]))
    return d_rows.to(rows.dtype), normed.to(rows.dtype), stacked


@torch.library.custom_op("vl3train::gelu_backward", mutates_args=("grad",))
def gelu_backward(grad: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
    """From ``grad``, the gradient of the GELU (tanh formula, in float32) of (R, W) ``wide``, that of ``wide`` in place.

    Rows as wide as these are what a layer's backward has least room for. Gives GELU(wide) again, (R, W), and the
    (W,) float32 column sums of the new gradient.
    """
    if wide.is_cuda:
        from vl3train.model.norm_kernels import gelu_backward_kernel

        return gelu_backward_kernel(grad, wide)
    return plain_gelu_backward(grad, wide)


@gelu_backward.register_fake
def _(grad: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
    return wide.new_empty(wide.shape), wide.new_empty((wide.shape[1],), dtype=torch.float32)


def plain_gelu_backward(grad: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
    """``gelu_backward`` in torch's own ops."""
    x = wide.float()
    d_wide = torch.ops.aten.gelu_backward(grad.float(), x, approximate="tanh")
    grad.copy_(d_wide)
    return F.gelu(x, approximate="tanh").to(wide.dtype), d_wide.sum(0)


class NormLinears(torch.autograd.Function):
    """A norm and the products that read it; the rows come out as they are, for the residual.

    So the residual's gradient comes back here too, and everything is added up in the norm's one pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        bias_in: Tensor | None,
        bias_past: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        eps: float,
        centred: bool,
        again: bool,
        turned: bool,
        *linears: Any,
    ) -> tuple[Tensor, ...]:
        """(R, W) rows -> the rows, and (R, out) for each product.

        ``linears`` are the weights (out, W), then as many biases or None. Handed over are ``bias_in``, which was
        added to every row, and ``bias_past``, which will be added to every row that comes out. ``again`` says that
        this runs once more in the backward pass: the normed rows are at hand there, and not made by the kernel.
        ``turned`` computes the weights' gradients as (W, out) and turns them around.
        """
        weights, biases = linears[: len(linears) // 2], linears[len(linears) // 2 :]
        if centred:
            normed = F.layer_norm(rows, norm_weight.shape, norm_weight, norm_bias, eps)
        else:
            x = rows.float()
            normed = norm_weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(rows.dtype)
        ctx.save_for_backward(rows, norm_weight, norm_bias, normed if again else None, *weights)
        ctx.eps, ctx.centred, ctx.again, ctx.turned = eps, centred, again, turned
        outputs = [F.linear(normed, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        return rows.view_as(rows), *outputs

    @staticmethod
    def backward(ctx: Any, residual_grad: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the tensors, in their order."""
        rows, norm_weight, norm_bias, normed, *weights = ctx.saved_tensors
        _, of_in, of_past, of_norm_weight, of_norm_bias, _, _, _, _, *of_linears = ctx.needs_input_grad
        of_weights, of_biases = of_linears[: len(weights)], of_linears[len(weights) :]
        weight_sums, row_sums = of_norm_weight or of_norm_bias, of_in or of_past
        d_rows, made, sums = norm_backward(
            [grad @ weight for grad, weight in zip(grads, weights, strict=True)],
            rows,
            norm_weight,
            norm_bias,
            ctx.eps,
            residual_grad,
            ctx.centred,
            any(of_weights) and not ctx.again,
            weight_sums,
            row_sums,
        )
        normed = normed if ctx.again else made
        d_norm_weight = sums[0].to(norm_weight.dtype) if of_norm_weight else None
        d_norm_bias = sums[1].to(norm_weight.dtype) if of_norm_bias else None
        d_in = sums[-2].to(rows.dtype) if of_in else None
        d_past = sums[-1].to(rows.dtype) if of_past else None
        d_weights = [
            _weight_grad(normed, grad, ctx.turned) if wanted else None
            for grad, wanted in zip(grads, of_weights, strict=True)
        ]
        d_biases = [grad.sum(0) if wanted else None for grad, wanted in zip(grads, of_biases, strict=True)]
        constants = None, None, None, None
        return d_rows, d_in, d_past, d_norm_weight, d_norm_bias, *constants, *d_weights, *d_biases


def _weight_grad(inputs: Tensor, grad: Tensor, turned: bool) -> Tensor:
    """(out, in) gradient of the weight of a product, from its inputs (R, in) and its outputs' gradient (R, out)."""
    return (inputs.t() @ grad).t() if turned else grad.t() @ inputs


class GeluLinear(torch.autograd.Function):
    """GELU and the product that reads it: only the rows before GELU are kept."""

    @staticmethod
    def forward(ctx: Any, wide: Tensor, bias_in: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        """(R, in), (in,), (out, in), (out,) -> (R, out).

        Handed over is ``bias_in``, which was added to every row of ``wide``; ``bias`` comes detached, handed over to
        what reads the residual.
        """
        ctx.save_for_backward(wide, weight)
        return F.linear(F.gelu(wide, approximate="tanh"), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``wide``, ``bias_in`` and ``weight``."""
        wide, weight = ctx.saved_tensors
        _, of_in, of_weight, _ = ctx.needs_input_grad
        d_wide = grad @ weight
        activated, sums = gelu_backward(d_wide, wide)
        return (
            d_wide,
            sums.to(wide.dtype) if of_in else None,
            grad.t() @ activated if of_weight else None,
            None,
        )
