"""Who makes the products of compiled layers, and proof that quack's are right on this machine."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vl3train.model.attention.backends import KernelChoice
from vl3train.model.attention.check import MAX_ERROR
from vl3train.model.kernels import gemm_accumulate, gemm_ops

NUM_ROWS = 333
"""Rows of a check: no multiple of any tile."""


@dataclass(frozen=True, slots=True)
class GemmShapes:
    """Of a row, of an MLP's wide row in the encoder (GELU) or the language model (``gated``, SwiGLU), and of heads."""

    hidden_size: int
    intermediate: int
    gated: bool
    heads: tuple[int, int, int]  # of queries, of keys (and as many of values), and the width of each


@dataclass(frozen=True, slots=True)
class GemmError:
    """Largest relative error of one op's results; ``failed`` says why there is none."""

    name: str
    error: float
    failed: str = ""

    @property
    def is_right(self) -> bool:
        """Whether it is below the limit; NaN is not."""
        return not self.failed and self.error < MAX_ERROR


def choose_gemm_backend(
    requested: str, hf_config: Any, device: torch.device, dtype: torch.dtype, *, compiled: bool
) -> KernelChoice:
    """``quack`` or ``torch``; ``auto`` takes quack's where they serve and are right, some seconds of proof.

    Raises ValueError where quack was asked for and cannot serve, or is wrong, with the figure.
    """
    if requested == "torch":
        return KernelChoice("torch", "asked for")
    all_shapes = shapes_of(hf_config)
    problem = why_not_quack(all_shapes, device, dtype, compiled=compiled)
    problem = problem or wrong_gemm(all_shapes, device, dtype)
    if problem is None:
        return KernelChoice("quack", "asked for" if requested == "quack" else "auto: first choice")
    if requested == "quack":
        raise ValueError(
            f"machine.gemm_backend=quack cannot serve: {problem}; machine.gemm_backend=auto takes what can"
        )
    return KernelChoice("torch", f"auto: not quack, {problem}")


def why_not_quack(
    all_shapes: Sequence[GemmShapes], device: torch.device, dtype: torch.dtype, *, compiled: bool
) -> str | None:
    """Why quack's products cannot serve, or None."""
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    if not compiled:
        return "it serves compiled layers only (machine.compile_layers=true)"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if wrong := [width for one in all_shapes for width in (one.hidden_size, one.intermediate) if width % 16]:
        return f"it needs widths that are multiples of 16, not {wrong}"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "its tiles are measured on GPUs of the Hopper generation only"
    try:
        importlib.import_module("vl3train.model.kernels.quack_gemm")
    except (ImportError, AttributeError, RuntimeError, TypeError) as error:
        return f"quack-kernels is not wholly installed ({error})"
    return None


def wrong_gemm(all_shapes: Sequence[GemmShapes], device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with quack's products for these widths, or None."""
    for widths in all_shapes:
        for found in gemm_errors(widths, device, dtype):
            if found.failed:
                return f"its {found.name} does not run here ({found.failed})"
            if not found.is_right:
                what = f"relative error against float64: {found.error:.2g}"
                return f"its {found.name} is wrong on this machine ({what})"
    return None


def shapes_of(hf_config: Any) -> tuple[GemmShapes, GemmShapes]:
    """Of the encoder and of the language model."""
    vision, text = hf_config.vision_config, hf_config.text_config
    num_heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    of_text = num_heads, kv_heads, getattr(text, "head_dim", None) or text.hidden_size // num_heads
    num_heads = vision.num_attention_heads
    of_vision = num_heads, num_heads, vision.hidden_size // num_heads
    return (
        GemmShapes(vision.hidden_size, vision.intermediate_size, gated=False, heads=of_vision),
        GemmShapes(text.hidden_size, text.intermediate_size, gated=True, heads=of_text),
    )


def added(op: Callable[..., None]) -> Callable[..., Tensor]:
    """The op on a copy of the sum that it changes, which is the result."""

    def act(total: Tensor, *arguments: Tensor) -> Tensor:
        total = total.clone()
        op(total, *arguments)
        return total

    return act


def gemm_errors(widths: GemmShapes, device: torch.device, dtype: torch.dtype) -> Iterator[GemmError]:
    """The ops that serve rows of these widths against float64. One that raises is reported, not raised."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        # A bias is as large as what it is added to, or its loss would not be seen.
        is_weight = len(shape) == 2 and shape[0] != NUM_ROWS
        scale = shape[1] ** -0.5 if is_weight else 1.0
        return (torch.randn(shape, device=device, generator=generator) * scale).to(dtype)

    def total(*shape: int) -> Tensor:
        # As large as what is added.
        return torch.randn(shape, device=device, generator=generator) * NUM_ROWS**0.5

    rows, grad = draw(NUM_ROWS, widths.hidden_size), draw(NUM_ROWS, widths.hidden_size)
    into, other, out = (draw(widths.intermediate, widths.hidden_size) for _ in range(3))
    calls: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]]
    if widths.gated:
        both, d_both = draw(NUM_ROWS, 2 * widths.intermediate), draw(NUM_ROWS, 2 * widths.intermediate)
        calls = {
            "linear_swiglu": (
                gemm_ops.linear_swiglu,
                gemm_ops.linear_swiglu_reference,
                (rows, into, other, True),
            ),
            "linear_swiglu, nothing kept": (  # another kernel
                lambda *arguments: gemm_ops.linear_swiglu(*arguments)[1],
                lambda *arguments: gemm_ops.linear_swiglu_reference(*arguments)[1],
                (rows, into, other, False),
            ),
            "recompute_gate_up": (
                lambda *tensors: gemm_ops.recompute_gate_up(*tensors, grad),
                gemm_ops.gate_up_reference,
                (rows, into, other),
            ),
            "swiglu_linear_backward": (
                gemm_ops.swiglu_linear_backward,
                gemm_ops.swiglu_linear_backward_reference,
                (grad, out.t().contiguous(), both, True),
            ),
            "swiglu_linear_backward, nothing again": (  # as above
                lambda *arguments: gemm_ops.swiglu_linear_backward(*arguments)[0],
                lambda *arguments: gemm_ops.swiglu_linear_backward_reference(*arguments)[0],
                (grad, out.t().contiguous(), both, False),
            ),
            "gate_up_rows_grad": (
                gemm_ops.gate_up_rows_grad,
                gemm_ops.gate_up_rows_grad_reference,
                (d_both, into, other),
            ),
            "linear_add": (
                gemm_ops.linear_add,
                lambda a, b, _, d: torch.nn.functional.linear(a, b) + d,
                (draw(NUM_ROWS, widths.intermediate), out.t().contiguous(), None, rows),
            ),
            "gate_up_weights_grad": (
                gemm_ops.gate_up_weights_grad,
                gemm_ops.gate_up_weights_grad_reference,
                (d_both, rows),
            ),
            "add_gate_up_weights_grad": (
                added(gemm_accumulate.add_gate_up_weights_grad),
                added(gemm_accumulate.add_gate_up_weights_grad_reference),
                (total(2 * widths.intermediate, widths.hidden_size), d_both, rows),
            ),
            "add_weight_grad": (
                added(gemm_accumulate.add_weight_grad),
                added(gemm_accumulate.add_weight_grad_reference),
                (total(widths.hidden_size, widths.intermediate), grad, draw(NUM_ROWS, widths.intermediate)),
            ),
        }
    else:
        intermediate = draw(NUM_ROWS, widths.intermediate)
        weight = out.t().contiguous()
        calls = {
            "linear_gelu": (
                gemm_ops.linear_gelu,
                gemm_ops.linear_gelu_reference,
                (rows, into, draw(widths.intermediate), True),
            ),
            "linear_gelu, nothing kept": (
                lambda *arguments: gemm_ops.linear_gelu(*arguments)[1],
                lambda *arguments: gemm_ops.linear_gelu_reference(*arguments)[1],
                (rows, into, draw(widths.intermediate), False),
            ),
            "gelu_linear_backward": (
                gemm_ops.gelu_linear_backward,
                gemm_ops.gelu_linear_backward_reference,
                (grad, weight, intermediate, True),
            ),
            "gelu_linear_backward, nothing again": (
                lambda *arguments: gemm_ops.gelu_linear_backward(*arguments)[::2],
                lambda *arguments: gemm_ops.gelu_linear_backward_reference(*arguments)[::2],
                (grad, weight, intermediate, False),
            ),
            "linear_add": (
                gemm_ops.linear_add,
                lambda a, b, c, d: torch.nn.functional.linear(a, b, c) + d,
                (intermediate, weight, draw(widths.hidden_size), rows),
            ),
            "rows_gemm": (gemm_ops.rows_gemm, torch.matmul, (intermediate, into)),
        }
    num_heads, kv_heads, head_dim = widths.heads
    if head_dim in gemm_ops.ROTATED_HEADS:
        qkv = (num_heads + 2 * kv_heads) * head_dim
        table = draw(NUM_ROWS, head_dim).to(
            dtype if widths.gated else torch.float32
        )  # as transformers has them
        arguments = rows, draw(qkv, widths.hidden_size), draw(qkv), table, num_heads + kv_heads
        calls["linear_rotate"] = gemm_ops.linear_rotate, gemm_ops.linear_rotate_reference, arguments
    for name, (op, plain, arguments) in calls.items():
        try:
            found = op(*arguments)
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
            message = str(error).splitlines()[0][:200] if str(error) else ""
            yield GemmError(name, float("nan"), f"{type(error).__name__}: {message}")
            continue
        exact = plain(*(x.double() if isinstance(x, Tensor) else x for x in arguments))
        pairs = zip(found, exact, strict=True) if isinstance(found, tuple) else [(found, exact)]
        # max() would pass over NaN
        errors = [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs]
        yield GemmError(name, next((error for error in errors if error != error), max(errors)))
