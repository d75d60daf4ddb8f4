"""Weight gradients added to float32 sums by the matrix product that computes them, as ops for model/layers/mlp_half.py.

So a gradient is not rounded to bfloat16 before it is summed, is not kept until the micro-batch ends, and needs no
separate addition. The engine owns the sums, (out, in) float32, sets them to zero (engine/zero/zero1_bf16.py) and passes
them to the layers; these weights get no ``grad``. Weights of one matrix product share one sum: an op that changes two
tensors of one buffer goes wrong in torch 2.11's compiler. R rows, W the hidden_size, I the intermediate_size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vl3train.model.kernels.gemm_ops import gate_up_weights_grad_reference


@torch.library.custom_op("vl3train::add_weight_grad", mutates_args=("total",))
def add_weight_grad(total: Tensor, grad: Tensor, rows: Tensor) -> None:
    """``total`` (out, in) += the gradient of F.linear's weight, from ``grad`` (R, out) and ``rows`` (R, in)."""
    if total.is_cuda:
        torch.addmm(total, grad.t(), rows, out_dtype=torch.float32, out=total)
    else:
        add_weight_grad_reference(total, grad, rows)


@add_weight_grad.register_fake
def _(total: Tensor, grad: Tensor, rows: Tensor) -> None:
    pass


def add_weight_grad_reference(total: Tensor, grad: Tensor, rows: Tensor) -> None:
    """``add_weight_grad`` in torch's own ops."""
    total.addmm_(grad.t().to(total.dtype), rows.to(total.dtype))


@torch.library.custom_op("vl3train::add_gate_up_weights_grad", mutates_args=("total",))
def add_gate_up_weights_grad(total: Tensor, d_gate_up: Tensor, rows: Tensor) -> None:
    """``total`` (2 I, W) += ``gate_up_weights_grad`` of ``d_gate_up`` and ``rows`` (model/kernels/gemm_ops.py)."""
    if total.is_cuda:
        from vl3train.model.kernels.quack_gemm import add_gate_up_weights_grad_kernel

        add_gate_up_weights_grad_kernel(total, d_gate_up, rows)
    else:
        add_gate_up_weights_grad_reference(total, d_gate_up, rows)


@add_gate_up_weights_grad.register_fake
def _(total: Tensor, d_gate_up: Tensor, rows: Tensor) -> None:
    pass


def add_gate_up_weights_grad_reference(total: Tensor, d_gate_up: Tensor, rows: Tensor) -> None:
    """``add_gate_up_weights_grad`` in torch's own ops."""
    total.add_(gate_up_weights_grad_reference(d_gate_up.to(total.dtype), rows.to(total.dtype)))
