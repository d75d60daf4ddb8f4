"""The passes over memory that torch.compile does not make by itself, as ops for model/layers/attention_half.py and
mlp_half.py
use them.

In a backward pass the compiler reads each row of a norm twice, writes the normed rows in a pass of their own and sums
each bias's gradient in another; it cannot rotate a part of a row where it lies. R rows, W values a row.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    recompute_normed: bool,
    weight_sums: bool,
    row_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of (R, W) ``rows`` that LayerNorm (``centred``) or RMSNorm normed, all arithmetic in float32.

    ``grads`` are 1 to 3 gradients of the normed rows, to be added up; ``residual_grad`` is what the rows got past
    the norm, added to the result. Gives (R, W) d_rows, the (R, W) normed rows again (``recompute_normed``, else empty),
    and (number, W) float32 sums over the rows in this order: with ``weight_sums`` the gradients of ``weight`` and of
    ``bias`` if there is one, with ``row_sums`` the sums of d_rows and of ``residual_grad`` if there is one.
    """
    arguments = (
        grads,
        rows,
        weight,
        bias,
        eps,
        residual_grad,
        centred,
        recompute_normed,
        weight_sums,
        row_sums,
    )
    if rows.is_cuda:
        from vl3train.model.kernels.triton_norm import norm_backward_kernel

        return norm_backward_kernel(*arguments)
    return norm_backward_reference(*arguments)


@norm_backward.register_fake
def _(
    grads: list[Tensor],
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual_grad: Tensor | None,
    centred: bool,
    recompute_normed: bool,
    weight_sums: bool,
    row_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    width = rows.shape[1]
    num_sums = weight_sums * (1 + (bias is not None)) + row_sums * (1 + (residual_grad is not None))
    return (
        rows.new_empty(rows.shape),
        rows.new_empty(rows.shape if recompute_normed else (0, width)),
        rows.new_empty((num_sums, width), dtype=torch.float32),
    )


def norm_backward_reference(
    grads: Sequence[Tensor],
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual_grad: Tensor | None,
    centred: bool,
    recompute_normed: bool,
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
    if recompute_normed:
        normed = x * weight.float() + (0 if bias is None else bias.float())
    stacked = torch.stack(sums) if sums else x.new_empty((0, x.shape[1]))
    return d_rows.to(rows.dtype), normed.to(rows.dtype), stacked


@torch.library.custom_op("vl3train::gelu_backward", mutates_args=("grad",))
def gelu_backward(grad: Tensor, intermediate: Tensor) -> tuple[Tensor, Tensor]:
    """From ``grad``, the gradient of the GELU (tanh formula, in float32) of (R, W) ``wide``, that of ``wide`` in place.

    Rows as wide as these are what a layer's backward has least room for. Gives GELU(wide) again, (R, W), and the
    (W,) float32 column sums of the new gradient.
    """
    if intermediate.is_cuda:
        from vl3train.model.kernels.triton_norm import gelu_backward_kernel

        return gelu_backward_kernel(grad, intermediate)
    return gelu_backward_reference(grad, intermediate)


@gelu_backward.register_fake
def _(grad: Tensor, intermediate: Tensor) -> tuple[Tensor, Tensor]:
    return intermediate.new_empty(intermediate.shape), intermediate.new_empty(
        (intermediate.shape[1],), dtype=torch.float32
    )


def gelu_backward_reference(grad: Tensor, intermediate: Tensor) -> tuple[Tensor, Tensor]:
    """``gelu_backward`` in torch's own ops."""
    x = intermediate.float()
    d_intermediate = torch.ops.aten.gelu_backward(grad.float(), x, approximate="tanh")
    grad.copy_(d_intermediate)
    return F.gelu(x, approximate="tanh").to(intermediate.dtype), d_intermediate.sum(0)


def rope_cos_sin(cos: Tensor, sin: Tensor) -> Tensor:
    """What ``rotate`` takes, (R, D): cosine and sine of each pair side by side.

    Both halves of a row of ``cos`` and ``sin`` (R, D) are equal, as transformers makes them.
    """
    half = cos.shape[1] // 2
    return torch.stack((cos[:, :half], sin[:, :half]), 2).flatten(1)


def pairs_together(rows: Tensor, head_dim: int) -> Tensor:
    """Of (heads * D, ...) rows of weights, those that RoPE turns as a pair next to each other: 0, D/2, 1, D/2 + 1, ...

    Queries and keys then come out in this order, which is nothing to attention, and RoPE need not reach half a head
    away.
    """
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def pairs_apart(rows: Tensor, head_dim: int) -> Tensor:
    """The way back from ``pairs_together``."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


@torch.library.custom_op("vl3train::rotate", mutates_args=("rows",))
def rotate(rows: Tensor, table: Tensor, num_rotated: int, backward: bool, column_sums: bool) -> Tensor:
    """RoPE in place on the first ``num_rotated`` heads of (R, W) ``rows``, whose pairs lie together; in float32.

    ``table`` (R, D) is rope_cos_sin's. ``backward`` rotates a gradient back. ``column_sums`` are (W,) float32, of what
    comes out, the heads that do not turn among them: a bias's gradient; else the result is empty.
    """
    if rows.is_cuda:
        from vl3train.model.kernels.triton_rope import rotate_kernel

        return rotate_kernel(rows, table, num_rotated, backward, column_sums)
    return rotate_reference(rows, table, num_rotated, backward, column_sums)


@rotate.register_fake
def _(rows: Tensor, table: Tensor, num_rotated: int, backward: bool, column_sums: bool) -> Tensor:
    return rows.new_empty((rows.shape[1] if column_sums else 0,), dtype=torch.float32)


def rotate_reference(
    rows: Tensor, table: Tensor, num_rotated: int, backward: bool, column_sums: bool
) -> Tensor:
    """``rotate`` in torch's own ops."""
    pairs = rows.view(len(rows), -1, table.shape[1] // 2, 2)
    one, other = pairs[:, :num_rotated].float().unbind(3)
    c, s = table.float().view(len(rows), 1, -1, 2).unbind(3)
    s = -s if backward else s
    rotated = torch.stack((one * c - other * s, other * c + one * s), 3)
    pairs[:, :num_rotated] = rotated.to(rows.dtype)
    if not column_sums:
        return rows.new_empty((0,), dtype=torch.float32)
    still = pairs[:, num_rotated:].float()
    return torch.cat((rotated.sum(0).flatten(), still.sum(0).flatten()))


@torch.library.custom_op("vl3train::recompute_linear", mutates_args=())
def recompute_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, after: Tensor) -> Tensor:
    """F.linear once more, in the backward pass: never before ``after``, the gradient that asks for it.

    An op of its own, because the compiler would see that the product is that of the forward pass, and keep it.
    """
    del after
    return F.linear(rows, weight, bias)


@recompute_linear.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None, after: Tensor) -> Tensor:
    return rows.new_empty((*rows.shape[:-1], weight.shape[0]))


def normed_rows(rows: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> Tensor:
    """LayerNorm where ``centred``, else RMSNorm as transformers rounds it."""
    if centred:
        return F.layer_norm(rows, weight.shape, weight, bias, eps)
    x = rows.float()
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(rows.dtype)


def norm_grads(sums: Tensor, wanted: Sequence[bool], weight: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of a norm's weight and bias, where they are wanted, from norm_backward's sums."""
    return tuple(sums[place].to(weight.dtype) if of else None for place, of in enumerate(wanted))
