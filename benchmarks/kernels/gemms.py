"""Matrix products with the pass that follows them: vl3train's ops against torch's own, compiled. Needs a GPU.

    python -m benchmarks.kernels.gemms             # a Markdown table: encoder, 2B, 7B
    python -m benchmarks.kernels.gemms --tiny      # small rows, on the CPU, where both are torch

Both sides get the same random rows and weights. The left one is what layers run with machine.gemm_backend=torch:
cuBLAS, and what torch.compile makes of the rest. A time is the mean over calls one after the other; inputs are far
larger than caches.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.markdown import table_head, table_row
from vl3train.contracts.shapes import ENCODER, LANGUAGE_MODELS
from vl3train.model.compiling import compiled
from vl3train.model.kernels import gemm_ops
from vl3train.model.kernels import ops as kernels_ops

REPEATS = 12
ENCODER_ROWS, DECODER_ROWS = 49_472, 16_384
TINY = (64, 32, 96)
"""Rows, hidden size, intermediate size."""

Case = tuple[str, Callable[[], Any], Callable[[], Any]]
"""Name, as torch does it, as the op does it."""


def encoder_cases(num_rows: int, width: int, intermediate_size: int, device: torch.device) -> Iterator[Case]:
    """What an encoder layer's MLP does."""
    draw = drawer(device)
    rows, grad, intermediate = draw(num_rows, width), draw(num_rows, width), draw(num_rows, intermediate_size)
    into, out = (
        draw(intermediate_size, width) / width**0.5,
        draw(width, intermediate_size) / intermediate_size**0.5,
    )
    bias, bias_out = draw(intermediate_size), draw(width)
    gelu, add = (compiled(f, enabled=device.type == "cuda") for f in (_gelu, torch.add))

    def back() -> Any:
        d_intermediate = grad @ out
        return d_intermediate, *kernels_ops.gelu_backward(d_intermediate, intermediate)

    yield (
        "fc1, GELU",
        lambda: gelu(F.linear(rows, into, bias)),
        lambda: gemm_ops.linear_gelu(rows, into, bias, True),
    )
    yield "back through fc2, GELU", back, lambda: gemm_ops.gelu_linear_backward(grad, out, intermediate, True)
    yield (
        "fc2, residual",
        lambda: add(F.linear(intermediate, out, bias_out), rows),
        lambda: gemm_ops.linear_add(intermediate, out, bias_out, rows),
    )
    yield "back through fc1", lambda: intermediate @ into, lambda: gemm_ops.rows_gemm(intermediate, into)


def decoder_cases(num_rows: int, width: int, intermediate_size: int, device: torch.device) -> Iterator[Case]:
    """What a language-model layer's MLP does."""
    draw = drawer(device)
    rows, grad = draw(num_rows, width), draw(num_rows, width)
    gate, up = draw(num_rows, intermediate_size), draw(num_rows, intermediate_size)
    both = torch.stack((gate, up), 2).flatten(1)
    weights = [draw(intermediate_size, width) / width**0.5 for _ in range(2)]
    out = draw(width, intermediate_size) / intermediate_size**0.5
    swiglu, swiglu_back, frozen_back = (
        compiled(f, enabled=device.type == "cuda") for f in (_swiglu, _swiglu_back, _frozen_swiglu_back)
    )
    yield (
        "gate, up, SwiGLU",
        lambda: swiglu(*(F.linear(rows, weight) for weight in weights)),
        lambda: gemm_ops.linear_swiglu(rows, *weights, True),
    )
    yield (
        "back through down, SwiGLU",
        lambda: swiglu_back(grad @ out, gate, up),
        lambda: gemm_ops.swiglu_linear_backward(grad, out, both, True),
    )
    yield (
        "the same of a frozen layer",
        lambda: frozen_back(grad @ out, gate, up),
        lambda: gemm_ops.swiglu_linear_backward(grad, out, both, False),
    )
    yield (
        "back through gate, up",
        lambda: (gate @ weights[0]) + (up @ weights[1]),
        lambda: gemm_ops.gate_up_rows_grad(both, *weights),
    )
    yield (
        "their weights' gradients",
        lambda: (gate.t() @ rows, up.t() @ rows),
        lambda: gemm_ops.gate_up_weights_grad(both, rows),
    )
    yield (
        "down, residual",
        lambda: torch.addmm(rows, gate, out.t()),
        lambda: gemm_ops.linear_add(gate, out, None, rows),
    )


def drawer(device: torch.device) -> Callable[..., Tensor]:
    """Random bfloat16 of a shape."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(shape, device=device, generator=generator).bfloat16()


def _gelu(intermediate: Tensor) -> Tensor:
    return F.gelu(intermediate, approximate="tanh")


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _swiglu_back(d_activated: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    d, x = d_activated.float(), gate.float()
    share = torch.sigmoid(x)
    made = x * share * up, d * x * share, d * up * share * (1 + x * (1 - share))
    return tuple(one.to(gate.dtype) for one in made)


def _frozen_swiglu_back(d_activated: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    return _swiglu_back(d_activated, gate, up)[1:]


def milliseconds(act: Callable[[], Any], device: torch.device) -> float:
    """Mean of some calls, after two that warm up."""
    for _ in range(2):
        act()
    if device.type != "cuda":
        started = time.perf_counter()
        act()
        return (time.perf_counter() - started) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(REPEATS):
        act()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / REPEATS


def main(words: list[str] | None = None) -> None:
    """One row of the table after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="small rows on the CPU, to try this script")
    args = parser.parse_args(words)
    device = torch.device("cpu" if args.tiny else "cuda")
    print(f"{'CPU' if args.tiny else torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print(table_head("rows", "what", "torch, ms", "quack, ms", numbers=2))
    towers = {"encoder": ENCODER, "2B": LANGUAGE_MODELS["2b"], "7B": LANGUAGE_MODELS["7b"]}
    for name, tower in towers.items():
        cases = decoder_cases if tower.is_decoder else encoder_cases
        num_rows = DECODER_ROWS if tower.is_decoder else ENCODER_ROWS
        size = num_rows, tower.hidden_size, tower.intermediate_size
        for what, plain, op in cases(*(TINY if args.tiny else size), device):
            times = [milliseconds(act, device) for act in (plain, op)]
            print(table_row(name, what, *(f"{ms:.3f}" for ms in times)), flush=True)


if __name__ == "__main__":
    main()
