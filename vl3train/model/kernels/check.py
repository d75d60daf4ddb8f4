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
class Widths:
    """Of a row, of an MLP's wide row in the encoder (GELU) or the language model (``gated``, SwiGLU), and of heads."""

    narrow: int
    wide: int
    gated: bool
    heads: tuple[int, int, int]  # of queries, of keys (and as many of values), and the width of each


@dataclass(frozen=True, slots=True)
class ProductError:
    """Largest relative error of one op's results; ``failed`` says why there is none."""

    name: str
    error: float
    failed: str = ""

    @property
    def is_right(self) -> bool:
        """Whether it is below the limit; NaN is not."""
        return not self.failed and self.error < MAX_ERROR


def choose_products(
    requested: str, hf_config: Any, device: torch.device, dtype: torch.dtype, *, compiled: bool
) -> KernelChoice:
    """``quack`` or ``torch``; ``auto`` takes quack's where they serve and are right, some seconds of proof.

    Raises ValueError where quack was asked for and cannot serve, or is wrong, with the figure.
    """
    if requested == "torch":
        return KernelChoice("torch", "asked for")
    all_widths = widths_of(hf_config)
    problem = why_not_quack(all_widths, device, dtype, compiled=compiled)
    problem = problem or wrong_product(all_widths, device, dtype)
    if problem is None:
        return KernelChoice("quack", "asked for" if requested == "quack" else "auto: first choice")
    if requested == "quack":
        raise ValueError(
            f"machine.products=quack cannot serve: {problem}; machine.products=auto takes what can"
        )
    return KernelChoice("torch", f"auto: not quack, {problem}")


def why_not_quack(
    all_widths: Sequence[Widths], device: torch.device, dtype: torch.dtype, *, compiled: bool
) -> str | None:
    """Why quack's products cannot serve, or None."""
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    if not compiled:
        return "it serves compiled layers only (machine.compile_layers=true)"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if wrong := [width for one in all_widths for width in (one.narrow, one.wide) if width % 16]:
        return f"it needs widths that are multiples of 16, not {wrong}"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "its tiles are measured on GPUs of the Hopper generation only"
    try:
        importlib.import_module("vl3train.model.kernels.quack_gemm")
    except (ImportError, AttributeError, RuntimeError, TypeError) as error:
        return f"quack-kernels is not wholly installed ({error})"
    return None


def wrong_product(all_widths: Sequence[Widths], device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with quack's products for these widths, or None."""
    for widths in all_widths:
        for found in product_errors(widths, device, dtype):
            if found.failed:
                return f"its {found.name} does not run here ({found.failed})"
            if not found.is_right:
                what = f"relative error against float64: {found.error:.2g}"
                return f"its {found.name} is wrong on this machine ({what})"
    return None


def widths_of(hf_config: Any) -> tuple[Widths, Widths]:
    """Of the encoder and of the language model."""
    vision, text = hf_config.vision_config, hf_config.text_config
    num_heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    of_text = num_heads, kv_heads, getattr(text, "head_dim", None) or text.hidden_size // num_heads
    num_heads = vision.num_attention_heads
    of_vision = num_heads, num_heads, vision.hidden_size // num_heads
    return (
        Widths(vision.hidden_size, vision.intermediate_size, gated=False, heads=of_vision),
        Widths(text.hidden_size, text.intermediate_size, gated=True, heads=of_text),
    )


def added(op: Callable[..., None]) -> Callable[..., Tensor]:
    """The op on a copy of the sum that it changes, which is the result."""

    def act(total: Tensor, *arguments: Tensor) -> Tensor:
        total = total.clone()
        op(total, *arguments)
        return total

    return act


def product_errors(widths: Widths, device: torch.device, dtype: torch.dtype) -> Iterator[ProductError]:
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

    rows, grad = draw(NUM_ROWS, widths.narrow), draw(NUM_ROWS, widths.narrow)
    into, other, out = (draw(widths.wide, widths.narrow) for _ in range(3))
    calls: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]]
    if widths.gated:
        both, d_both = draw(NUM_ROWS, 2 * widths.wide), draw(NUM_ROWS, 2 * widths.wide)
        calls = {
            "linear_swiglu": (
                gemm_ops.linear_swiglu,
                gemm_ops.plain_linear_swiglu,
                (rows, into, other, True),
            ),
            "linear_swiglu, nothing kept": (  # another kernel
                lambda *arguments: gemm_ops.linear_swiglu(*arguments)[1],
                lambda *arguments: gemm_ops.plain_linear_swiglu(*arguments)[1],
                (rows, into, other, False),
            ),
            "gate_up_again": (
                lambda *tensors: gemm_ops.gate_up_again(*tensors, grad),
                gemm_ops.plain_gate_up,
                (rows, into, other),
            ),
            "swiglu_linear_backward": (
                gemm_ops.swiglu_linear_backward,
                gemm_ops.plain_swiglu_linear_backward,
                (grad, out.t().contiguous(), both, True),
            ),
            "swiglu_linear_backward, nothing again": (  # as above
                lambda *arguments: gemm_ops.swiglu_linear_backward(*arguments)[0],
                lambda *arguments: gemm_ops.plain_swiglu_linear_backward(*arguments)[0],
                (grad, out.t().contiguous(), both, False),
            ),
            "gate_up_rows_grad": (
                gemm_ops.gate_up_rows_grad,
                gemm_ops.plain_gate_up_rows_grad,
                (d_both, into, other),
            ),
            "linear_add": (
                gemm_ops.linear_add,
                lambda a, b, _, d: torch.nn.functional.linear(a, b) + d,
                (draw(NUM_ROWS, widths.wide), out.t().contiguous(), None, rows),
            ),
            "gate_up_weights_grad": (
                gemm_ops.gate_up_weights_grad,
                gemm_ops.plain_gate_up_weights_grad,
                (d_both, rows),
            ),
            "add_gate_up_weights_grad": (
                added(gemm_accumulate.add_gate_up_weights_grad),
                added(gemm_accumulate.plain_add_gate_up_weights_grad),
                (total(2 * widths.wide, widths.narrow), d_both, rows),
            ),
            "add_weight_grad": (
                added(gemm_accumulate.add_weight_grad),
                added(gemm_accumulate.plain_add_weight_grad),
                (total(widths.narrow, widths.wide), grad, draw(NUM_ROWS, widths.wide)),
            ),
        }
    else:
        wide = draw(NUM_ROWS, widths.wide)
        weight = out.t().contiguous()
        calls = {
            "linear_gelu": (
                gemm_ops.linear_gelu,
                gemm_ops.plain_linear_gelu,
                (rows, into, draw(widths.wide), True),
            ),
            "linear_gelu, nothing kept": (
                lambda *arguments: gemm_ops.linear_gelu(*arguments)[1],
                lambda *arguments: gemm_ops.plain_linear_gelu(*arguments)[1],
                (rows, into, draw(widths.wide), False),
            ),
            "gelu_linear_backward": (
                gemm_ops.gelu_linear_backward,
                gemm_ops.plain_gelu_linear_backward,
                (grad, weight, wide, True),
            ),
            "gelu_linear_backward, nothing again": (
                lambda *arguments: gemm_ops.gelu_linear_backward(*arguments)[::2],
                lambda *arguments: gemm_ops.plain_gelu_linear_backward(*arguments)[::2],
                (grad, weight, wide, False),
            ),
            "linear_add": (
                gemm_ops.linear_add,
                lambda a, b, c, d: torch.nn.functional.linear(a, b, c) + d,
                (wide, weight, draw(widths.narrow), rows),
            ),
            "rows_product": (gemm_ops.rows_product, torch.matmul, (wide, into)),
        }
    num_heads, kv_heads, head_dim = widths.heads
    if head_dim in gemm_ops.ROTATED_HEADS:
        qkv = (num_heads + 2 * kv_heads) * head_dim
        table = draw(NUM_ROWS, head_dim).to(
            dtype if widths.gated else torch.float32
        )  # as transformers has them
        arguments = rows, draw(qkv, widths.narrow), draw(qkv), table, num_heads + kv_heads
        calls["linear_rotate"] = gemm_ops.linear_rotate, gemm_ops.plain_linear_rotate, arguments
    for name, (op, plain, arguments) in calls.items():
        try:
            found = op(*arguments)
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
            message = str(error).splitlines()[0][:200] if str(error) else ""
            yield ProductError(name, float("nan"), f"{type(error).__name__}: {message}")
            continue
        exact = plain(*(x.double() if isinstance(x, Tensor) else x for x in arguments))
        pairs = zip(found, exact, strict=True) if isinstance(found, tuple) else [(found, exact)]
        # max() would pass over NaN
        errors = [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs]
        yield ProductError(name, next((error for error in errors if error != error), max(errors)))
