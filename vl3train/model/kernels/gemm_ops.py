"""Matrix products with fused epilogues, as custom ops for model/layers/attention_half.py and mlp_half.py.

On a GPU quack's kernels compute the matrix product and the elementwise work after it at once
(model/kernels/quack_gemm.py). The references here are the same formulas in torch's own ops: for the CPU, and what the
kernels are checked against.

R rows, W the hidden_size, I the intermediate_size. ``gate_up`` is (R, 2 I): gate and up of each place side by side, as
the kernels want them. ``gate_weight`` and ``up_weight`` are (I, W) each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vl3train.model.kernels.ops import gelu_backward_reference, rotate_reference

ROPE_HEAD_DIMS = (128,)
"""Head dimensions that linear_rotate has a kernel for: Qwen2.5's. Tiles must hold whole heads. A tile of 144 for the
encoder's heads of 72 gave wrong results (relative error 0.9, benchmarks/log.md)."""


@torch.library.custom_op("vl3train::linear_rotate", mutates_args=())
def linear_rotate(rows: Tensor, weight: Tensor, bias: Tensor, cos_sin: Tensor, num_rotary: int) -> Tensor:
    """F.linear, then RoPE on the first ``num_rotary`` heads of the result; ``cos_sin`` as ``ops.rotate`` takes it."""
    if rows.is_cuda:
        from vl3train.model.kernels.quack_gemm import linear_rotate_kernel

        return linear_rotate_kernel(rows, weight, bias, cos_sin, num_rotary)
    return linear_rotate_reference(rows, weight, bias, cos_sin, num_rotary)


@linear_rotate.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor, cos_sin: Tensor, num_rotary: int) -> Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[0]))


def linear_rotate_reference(
    rows: Tensor, weight: Tensor, bias: Tensor, cos_sin: Tensor, num_rotary: int
) -> Tensor:
    """``linear_rotate`` in torch's own ops."""
    qkv = F.linear(rows, weight, bias)
    rotate_reference(qkv, cos_sin, num_rotary, False, False)
    return qkv


@torch.library.custom_op("vl3train::linear_gelu", mutates_args=())
def linear_gelu(rows: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """(R, I): F.linear of ``rows`` (R, W) and ``weight`` (I, W), and its GELU by the tanh formula.

    Without ``keep`` the first is empty.
    """
    if rows.is_cuda:
        from vl3train.model.kernels.quack_gemm import linear_gelu_kernel

        return linear_gelu_kernel(rows, weight, bias, keep)
    return linear_gelu_reference(rows, weight, bias, keep)


@linear_gelu.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    shape = rows.shape[0], weight.shape[0]
    return rows.new_empty(shape if keep else (0, shape[1])), rows.new_empty(shape)


def linear_gelu_reference(rows: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """``linear_gelu`` in torch's own ops."""
    intermediate = F.linear(rows, weight, bias)
    activated = F.gelu(intermediate, approximate="tanh")
    return intermediate if keep else intermediate.new_empty((0, len(weight))), activated


@torch.library.custom_op("vl3train::gelu_linear_backward", mutates_args=())
def gelu_linear_backward(
    grad: Tensor, weight: Tensor, intermediate: Tensor, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of the matrix product with ``weight`` (W, I) and of the GELU of ``intermediate`` (R, I) before it.

    ``grad`` (R, W) -> the gradient of ``intermediate`` (R, I), the GELU recomputed (R, I), and the float32 column sums
    (I,) of the gradient. Without ``recompute`` the second is empty.
    """
    if grad.is_cuda:
        from vl3train.model.kernels.quack_gemm import gelu_linear_backward_kernel

        return gelu_linear_backward_kernel(grad, weight, intermediate, recompute)
    return gelu_linear_backward_reference(grad, weight, intermediate, recompute)


@gelu_linear_backward.register_fake
def _(grad: Tensor, weight: Tensor, intermediate: Tensor, recompute: bool) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, width = intermediate.shape
    sums = intermediate.new_empty((width,), dtype=torch.float32)
    return (
        intermediate.new_empty((num_rows, width)),
        intermediate.new_empty((num_rows if recompute else 0, width)),
        sums,
    )


def gelu_linear_backward_reference(
    grad: Tensor, weight: Tensor, intermediate: Tensor, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``gelu_linear_backward`` in torch's own ops."""
    d_intermediate = grad @ weight
    activated, sums = gelu_backward_reference(d_intermediate, intermediate)
    if not recompute:
        activated = intermediate.new_empty((0, intermediate.shape[1]))
    return d_intermediate, activated, sums


@torch.library.custom_op("vl3train::linear_swiglu", mutates_args=())
def linear_swiglu(rows: Tensor, gate_weight: Tensor, up_weight: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """``gate_up`` of ``rows`` (R, W), empty without ``keep``, and silu(gate) * up (R, I)."""
    if rows.is_cuda:
        from vl3train.model.kernels.quack_gemm import linear_swiglu_kernel

        return linear_swiglu_kernel(rows, gate_weight, up_weight, keep)
    return linear_swiglu_reference(rows, gate_weight, up_weight, keep)


@linear_swiglu.register_fake
def _(rows: Tensor, gate_weight: Tensor, up_weight: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    num_rows, width = rows.shape[0], gate_weight.shape[0]
    return rows.new_empty((num_rows if keep else 0, 2 * width)), rows.new_empty((num_rows, width))


def linear_swiglu_reference(
    rows: Tensor, gate_weight: Tensor, up_weight: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """``linear_swiglu`` in torch's own ops."""
    gate_up = gate_up_reference(rows, gate_weight, up_weight)
    gate, up = gate_up.unflatten(1, (-1, 2)).unbind(2)
    return gate_up if keep else gate_up.new_empty((0, gate_up.shape[1])), F.silu(gate) * up


@torch.library.custom_op("vl3train::recompute_gate_up", mutates_args=())
def recompute_gate_up(rows: Tensor, gate_weight: Tensor, up_weight: Tensor, after: Tensor) -> Tensor:
    """``gate_up`` recomputed in the backward pass, not before ``after`` exists (see ``ops.recompute_linear``)."""
    del after
    if rows.is_cuda:
        from vl3train.model.kernels.quack_gemm import gate_up_kernel

        return gate_up_kernel(rows, gate_weight, up_weight)
    return gate_up_reference(rows, gate_weight, up_weight)


@recompute_gate_up.register_fake
def _(rows: Tensor, gate_weight: Tensor, up_weight: Tensor, after: Tensor) -> Tensor:
    return rows.new_empty((rows.shape[0], 2 * gate_weight.shape[0]))


def gate_up_reference(rows: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """``recompute_gate_up`` in torch's own ops."""
    return torch.stack((F.linear(rows, gate_weight), F.linear(rows, up_weight)), 2).flatten(1)


@torch.library.custom_op("vl3train::swiglu_linear_backward", mutates_args=())
def swiglu_linear_backward(
    grad: Tensor, weight: Tensor, gate_up: Tensor, recompute: bool
) -> tuple[Tensor, Tensor]:
    """Backward of the matrix product with ``weight`` (W, I) and of the SwiGLU of ``gate_up`` before it.

    ``grad`` (R, W) -> the gradient of ``gate_up`` (R, 2 I), and silu(gate) * up recomputed (R, I). The second is empty
    without ``recompute``: only the weight's gradient needs it. A frozen layer saves a fifth of the kernel's traffic.
    """
    if grad.is_cuda:
        from vl3train.model.kernels.quack_gemm import swiglu_linear_backward_kernel

        return swiglu_linear_backward_kernel(grad, weight, gate_up, recompute)
    return swiglu_linear_backward_reference(grad, weight, gate_up, recompute)


@swiglu_linear_backward.register_fake
def _(grad: Tensor, weight: Tensor, gate_up: Tensor, recompute: bool) -> tuple[Tensor, Tensor]:
    num_rows = gate_up.shape[0]
    return gate_up.new_empty(gate_up.shape), gate_up.new_empty(
        (num_rows if recompute else 0, weight.shape[1])
    )


def swiglu_linear_backward_reference(
    grad: Tensor, weight: Tensor, gate_up: Tensor, recompute: bool
) -> tuple[Tensor, Tensor]:
    """``swiglu_linear_backward`` in torch's own ops, in float32 or float64."""
    high = torch.promote_types(grad.dtype, torch.float32)
    d_activated = (grad @ weight).to(high)
    gate, up = gate_up.to(high).unflatten(1, (-1, 2)).unbind(2)
    sigmoid = torch.sigmoid(gate)
    d_gate = d_activated * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_gate_up = torch.stack((d_gate, d_activated * gate * sigmoid), 2).flatten(1)
    activated = gate * sigmoid * up if recompute else gate_up.new_empty((0, weight.shape[1]))
    return d_gate_up.to(grad.dtype), activated.to(grad.dtype)


@torch.library.custom_op("vl3train::gate_up_rows_grad", mutates_args=())
def gate_up_rows_grad(d_gate_up: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """The gradient (R, W) of the rows, from that of ``gate_up`` (R, 2 I)."""
    if d_gate_up.is_cuda:
        from vl3train.model.kernels.quack_gemm import gate_up_rows_grad_kernel

        return gate_up_rows_grad_kernel(d_gate_up, gate_weight, up_weight)
    return gate_up_rows_grad_reference(d_gate_up, gate_weight, up_weight)


@gate_up_rows_grad.register_fake
def _(d_gate_up: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    return d_gate_up.new_empty((d_gate_up.shape[0], gate_weight.shape[1]))


def gate_up_rows_grad_reference(d_gate_up: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """``gate_up_rows_grad`` in torch's own ops."""
    return d_gate_up @ torch.stack((gate_weight, up_weight), 1).flatten(0, 1)


@torch.library.custom_op("vl3train::gate_up_weights_grad", mutates_args=())
def gate_up_weights_grad(d_gate_up: Tensor, rows: Tensor) -> Tensor:
    """The gradients of both weights, one below the other (2 I, W), from that of ``gate_up`` (R, 2 I)."""
    if rows.is_cuda:
        from vl3train.model.kernels.quack_gemm import gate_up_weights_grad_kernel

        return gate_up_weights_grad_kernel(d_gate_up, rows)
    return gate_up_weights_grad_reference(d_gate_up, rows)


@gate_up_weights_grad.register_fake
def _(d_gate_up: Tensor, rows: Tensor) -> Tensor:
    return rows.new_empty((d_gate_up.shape[1], rows.shape[1]))


def gate_up_weights_grad_reference(d_gate_up: Tensor, rows: Tensor) -> Tensor:
    """``gate_up_weights_grad`` in torch's own ops."""
    return (d_gate_up.t() @ rows).unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1).contiguous()


@torch.library.custom_op("vl3train::linear_add", mutates_args=())
def linear_add(rows: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor) -> Tensor:
    """F.linear of ``rows`` (R, in) and ``weight`` (W, in), plus ``added`` (R, W); the kernel rounds once.

    Differentiable, except in ``bias``: pass it detached, another function computes its gradient (see
    model/layers/mlp_half.py).
    """
    if rows.is_cuda:
        from vl3train.model.kernels.quack_gemm import linear_add_kernel

        return linear_add_kernel(rows, weight, bias, added)
    return F.linear(rows, weight, bias) + added


@linear_add.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor) -> Tensor:
    return added.new_empty(added.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight = ctx.saved_tensors
    if ctx.needs_input_grad[2]:
        raise RuntimeError("linear_add has no gradient for its bias: pass the bias detached")
    return rows_gemm(grad, weight), grad.t() @ rows if ctx.needs_input_grad[1] else None, None, grad


linear_add.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op("vl3train::rows_gemm", mutates_args=())
def rows_gemm(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows`` (R, K) @ ``weight`` (K, N): for many rows, and for K and N of up to a few thousand."""
    if rows.is_cuda:
        from vl3train.model.kernels.quack_gemm import rows_gemm_kernel

        return rows_gemm_kernel(rows, weight)
    return rows @ weight


@rows_gemm.register_fake
def _(rows: Tensor, weight: Tensor) -> Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[1]))
