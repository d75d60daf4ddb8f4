"""Fused passes over memory that torch.compile cannot make by itself, as custom ops for the layers.

In a backward pass the compiler reads each row of a norm twice, writes the normed rows in a separate pass, and sums each
bias's gradient in another. It cannot apply RoPE in place to a part of a row. Here each is one pass. R rows, W values a
row.
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
    """Backward of LayerNorm (``centred``) or RMSNorm of ``rows`` (R, W), computed in float32.

    ``grads`` are 1 to 3 gradients of the normed rows; their sum counts. ``residual_grad`` is the gradient of ``rows``
    that comes past the norm; it is added to the result. Returns

    - ``d_rows`` (R, W),
    - the normed rows (R, W), recomputed; empty without ``recompute_normed``,
    - float32 sums over the rows (number, W), in this order: with ``weight_sums`` the gradients of ``weight`` and of
      ``bias``, with ``row_sums`` the sums of ``d_rows`` and of ``residual_grad``. What is None has no sum.

    Ten plain arguments: a custom op takes no record.
    """
    settings = eps, residual_grad, centred, recompute_normed, weight_sums, row_sums
    if rows.is_cuda:
        from vl3train.model.kernels.triton_norm import norm_backward_kernel

        return norm_backward_kernel(grads, rows, weight, bias, *settings)
    return norm_backward_reference(grads, rows, weight, bias, *settings)


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
    """``norm_backward`` in torch's own ops: for the CPU, and what the kernel is checked against."""
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
    """Backward of GELU (tanh formula, in float32) in place: ``grad`` of its result becomes that of ``intermediate``.

    Both are (R, I); in place because a layer's backward pass has the least room for rows of this size. Returns
    GELU(intermediate) recomputed (R, I), and the float32 column sums (I,) of the new gradient.
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
    """The angles as ``rotate`` takes them (R, D): cosine and sine of each pair side by side.

    ``cos`` and ``sin`` are (R, D), as transformers makes them: both halves of a row are equal.
    """
    half = cos.shape[1] // 2
    return torch.stack((cos[:, :half], sin[:, :half]), 2).flatten(1)


def interleave_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder rows of weights (heads * D, ...) within each head: 0, D/2, 1, D/2 + 1, ...

    RoPE rotates values D/2 apart as a pair; so a pair lies side by side. Queries and keys both come out in this order,
    so attention gives the same result.
    """
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def separate_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of ``interleave_pairs``."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


@torch.library.custom_op("vl3train::rotate", mutates_args=("rows",))
def rotate(rows: Tensor, cos_sin: Tensor, num_rotary: int, backward: bool, column_sums: bool) -> Tensor:
    """RoPE in place on the first ``num_rotary`` heads of ``rows`` (R, W), whose pairs are interleaved; in float32.

    ``cos_sin`` (R, D) is from ``rope_cos_sin``. ``backward`` rotates by the negative angle, as for a gradient. With
    ``column_sums`` returns the float32 sums (W,) of the new rows, heads without RoPE too: a bias's gradient. Else the
    result is empty.
    """
    if rows.is_cuda:
        from vl3train.model.kernels.triton_rope import rotate_kernel

        return rotate_kernel(rows, cos_sin, num_rotary, backward, column_sums)
    return rotate_reference(rows, cos_sin, num_rotary, backward, column_sums)


@rotate.register_fake
def _(rows: Tensor, cos_sin: Tensor, num_rotary: int, backward: bool, column_sums: bool) -> Tensor:
    return rows.new_empty((rows.shape[1] if column_sums else 0,), dtype=torch.float32)


def rotate_reference(
    rows: Tensor, cos_sin: Tensor, num_rotary: int, backward: bool, column_sums: bool
) -> Tensor:
    """``rotate`` in torch's own ops."""
    pairs = rows.view(len(rows), -1, cos_sin.shape[1] // 2, 2)
    x, y = pairs[:, :num_rotary].float().unbind(3)
    c, s = cos_sin.float().view(len(rows), 1, -1, 2).unbind(3)
    s = -s if backward else s
    rotated = torch.stack((x * c - y * s, y * c + x * s), 3)
    pairs[:, :num_rotary] = rotated.to(rows.dtype)
    if not column_sums:
        return rows.new_empty((0,), dtype=torch.float32)
    rest = pairs[:, num_rotary:].float()
    return torch.cat((rotated.sum(0).flatten(), rest.sum(0).flatten()))


@torch.library.custom_op("vl3train::recompute_linear", mutates_args=())
def recompute_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, after: Tensor) -> Tensor:
    """F.linear recomputed in the backward pass, not before ``after`` exists: the gradient that needs it.

    It is an op because torch.compile would see that the forward pass has the same matrix product, and keep its result.
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
    """Gradients of a norm's weight and bias from norm_backward's sums; None where one is not ``wanted``."""
    return tuple(sums[place].to(weight.dtype) if want else None for place, want in enumerate(wanted))
