"""The cases on which model/kernels/check.py compares the ops of gemm_ops.py with their references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vl3train.contracts.shapes import TowerShape
from vl3train.model.kernels import gemm_accumulate, gemm_ops

NUM_ROWS = 333
"""Rows of a case: no multiple of any tile."""


@dataclass(frozen=True, slots=True)
class GemmCase:
    """One op, what it should compute, and the arguments of both."""

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    arguments: tuple[Any, ...]


class Draws:
    """Random tensors on one device, the same in every call."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, generator=self.generator)

    def rows(self, width: int) -> Tensor:
        """(NUM_ROWS, width), standard normal."""
        return self._normal(NUM_ROWS, width).to(self.dtype)

    def weight(self, outputs: int, inputs: int) -> Tensor:
        """(outputs, inputs), scaled so that its product with ``rows`` is standard normal too."""
        return (self._normal(outputs, inputs) * inputs**-0.5).to(self.dtype)

    def bias(self, outputs: int) -> Tensor:
        """(outputs,), as large as what it is added to: a lost bias shows."""
        return self._normal(outputs).to(self.dtype)

    def gradient_sum(self, outputs: int, inputs: int) -> Tensor:
        """(outputs, inputs) float32, as large as the gradient that is added to it."""
        return self._normal(outputs, inputs) * NUM_ROWS**0.5


def gemm_cases(shape: TowerShape, device: torch.device, dtype: torch.dtype) -> list[GemmCase]:
    """A case for each kernel that compiled layers of this shape use."""
    draw = Draws(device, dtype)
    rows = draw.rows(shape.hidden_size)
    cases = _decoder_cases(shape, draw, rows) if shape.is_decoder else _encoder_cases(shape, draw, rows)
    return cases + _rotary_cases(shape, draw, rows)


def _decoder_cases(shape: TowerShape, draw: Draws, rows: Tensor) -> list[GemmCase]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    grad = draw.rows(hidden)
    gate, up, down = draw.weight(inner, hidden), draw.weight(inner, hidden), draw.weight(hidden, inner)
    gate_up, d_gate_up, activated = draw.rows(2 * inner), draw.rows(2 * inner), draw.rows(inner)
    ops, accumulate = gemm_ops, gemm_accumulate
    return [
        *_with_and_without(
            "linear_swiglu, nothing kept",
            GemmCase("linear_swiglu", ops.linear_swiglu, ops.linear_swiglu_reference, (rows, gate, up)),
            always_given=(1,),
        ),
        GemmCase(
            "recompute_gate_up",
            lambda *tensors: ops.recompute_gate_up(*tensors, grad),
            ops.gate_up_reference,
            (rows, gate, up),
        ),
        *_with_and_without(
            "swiglu_linear_backward, nothing recomputed",
            GemmCase(
                "swiglu_linear_backward",
                ops.swiglu_linear_backward,
                ops.swiglu_linear_backward_reference,
                (grad, down, gate_up),
            ),
            always_given=(0,),
        ),
        GemmCase(
            "gate_up_rows_grad", ops.gate_up_rows_grad, ops.gate_up_rows_grad_reference, (d_gate_up, gate, up)
        ),
        GemmCase("linear_add", ops.linear_add, _linear_add_reference, (activated, down, None, rows)),
        GemmCase(
            "gate_up_weights_grad",
            ops.gate_up_weights_grad,
            ops.gate_up_weights_grad_reference,
            (d_gate_up, rows),
        ),
        GemmCase(
            "add_gate_up_weights_grad",
            _on_a_copy(accumulate.add_gate_up_weights_grad),
            _on_a_copy(accumulate.add_gate_up_weights_grad_reference),
            (draw.gradient_sum(2 * inner, hidden), d_gate_up, rows),
        ),
        GemmCase(
            "add_weight_grad",
            _on_a_copy(accumulate.add_weight_grad),
            _on_a_copy(accumulate.add_weight_grad_reference),
            (draw.gradient_sum(hidden, inner), grad, activated),
        ),
    ]


def _encoder_cases(shape: TowerShape, draw: Draws, rows: Tensor) -> list[GemmCase]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    grad, intermediate = draw.rows(hidden), draw.rows(inner)
    fc1, fc2 = draw.weight(inner, hidden), draw.weight(hidden, inner)
    ops = gemm_ops
    return [
        *_with_and_without(
            "linear_gelu, nothing kept",
            GemmCase(
                "linear_gelu", ops.linear_gelu, ops.linear_gelu_reference, (rows, fc1, draw.bias(inner))
            ),
            always_given=(1,),
        ),
        *_with_and_without(
            "gelu_linear_backward, nothing recomputed",
            GemmCase(
                "gelu_linear_backward",
                ops.gelu_linear_backward,
                ops.gelu_linear_backward_reference,
                (grad, fc2, intermediate),
            ),
            always_given=(0, 2),
        ),
        GemmCase(
            "linear_add", ops.linear_add, _linear_add_reference, (intermediate, fc2, draw.bias(hidden), rows)
        ),
        GemmCase("rows_gemm", ops.rows_gemm, torch.matmul, (intermediate, fc1)),
    ]


def _rotary_cases(shape: TowerShape, draw: Draws, rows: Tensor) -> list[GemmCase]:
    if shape.head_dim not in gemm_ops.ROPE_HEAD_DIMS:
        return []
    num_rotary = shape.num_heads + shape.num_kv_heads
    outputs = (num_rotary + shape.num_kv_heads) * shape.head_dim
    # The language model's angles have its dtype, the encoder's are float32: as transformers has them.
    cos_sin = draw.rows(shape.head_dim).to(draw.dtype if shape.is_decoder else torch.float32)
    arguments = rows, draw.weight(outputs, shape.hidden_size), draw.bias(outputs), cos_sin, num_rotary
    return [GemmCase("linear_rotate", gemm_ops.linear_rotate, gemm_ops.linear_rotate_reference, arguments)]


def _with_and_without(name: str, case: GemmCase, *, always_given: tuple[int, ...]) -> list[GemmCase]:
    """Two cases of an op whose last argument says whether one result is left empty: another kernel serves then.

    ``name`` is that of the second case; ``always_given`` are the places of the results that it has.
    """

    def given(op: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *arguments: tuple(op(*arguments)[place] for place in always_given)

    return [
        GemmCase(case.name, case.op, case.reference, (*case.arguments, True)),
        GemmCase(name, given(case.op), given(case.reference), (*case.arguments, False)),
    ]


def _linear_add_reference(rows: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor) -> Tensor:
    return torch.nn.functional.linear(rows, weight, bias) + added


def _on_a_copy(op: Callable[..., None]) -> Callable[..., Tensor]:
    """The op on a copy of the sum that it changes; the copy is the result."""

    def act(total: Tensor, *arguments: Tensor) -> Tensor:
        total = total.clone()
        op(total, *arguments)
        return total

    return act
