"""Gradients of norm and GELU: vl3train's kernels against what torch.compile makes of the same formulas. Needs a GPU.

    python -m benchmarks.kernels.norms             # a Markdown table
    python -m benchmarks.kernels.norms --sweep     # and other launch settings

The formulas are vl3train.model.kernels.ops's plain ones, compiled as layers are. GB/s counts each tensor of rows once.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.markdown import table_head, table_row
from vl3train.contracts.shapes import ENCODER, LANGUAGE_MODELS
from vl3train.model.compiling import compiled
from vl3train.model.kernels import triton_norm
from vl3train.model.kernels.ops import gelu_backward_reference, norm_backward_reference

REPEATS = 30
NORMS = {
    # rows, hidden size, gradients, LayerNorm, sums of rows
    "encoder, before q k v": (49_152, ENCODER.hidden_size, 1, True, False),
    "encoder, before fc1": (49_152, ENCODER.hidden_size, 1, True, True),
    "2B": (16_384, LANGUAGE_MODELS["2b"].hidden_size, 1, False, False),
    "7B": (16_384, LANGUAGE_MODELS["7b"].hidden_size, 1, False, False),
}
GELU = "encoder, GELU", (49_152, ENCODER.intermediate_size)
SWEPT_NORM = {
    "WARPS_PER_SM": tuple(dict.fromkeys(range(5), warps) for warps in (12, 16, 24, 32)),
    "VALUES_PER_WARP": (256, 512),
}
SWEPT_GELU = {"GELU_PROGRAMS_PER_SM": (3, 4, 6, 8), "STAGES": (1, 2, 3)}


def norm_arguments(
    num_rows: int, width: int, num_grads: int, centred: bool, row_sums: bool
) -> tuple[Any, ...]:
    """What ``vl3train::norm_backward`` takes in a layer that trains."""
    rows, residual, *grads = torch.randn(2 + num_grads, num_rows, width, device="cuda").bfloat16()
    weight, bias = torch.randn(2, width, device="cuda").bfloat16()
    return grads, rows, weight, bias if centred else None, 1e-6, residual, centred, True, True, row_sums


def milliseconds(function: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """Mean over ``REPEATS`` calls, one after the other; inputs are far larger than the caches."""
    for _ in range(5):
        function(*arguments)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(REPEATS):
        function(*arguments)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / REPEATS


def worst(found: Any, expected: Any) -> float:
    """The largest difference, of each output's largest value."""
    return max(
        float((one.float() - other.float()).abs().max() / other.float().abs().max())
        for one, other in zip(found, expected, strict=True)
        if isinstance(one, torch.Tensor)
    )


def sweep(
    name: str, kernel: Callable[..., Any], arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """Times for every pair of values of two constants of model/kernels/triton_norm.py, which stay as they were."""
    (one, first), (other, second) = constants.items()
    kept = getattr(triton_norm, one), getattr(triton_norm, other)
    for a in first:
        for b in second:
            setattr(triton_norm, one, a)
            setattr(triton_norm, other, b)
            shown = next(iter(a.values())) if isinstance(a, dict) else a
            print(
                f"  {name}: {one}={shown} {other}={b}: {milliseconds(kernel, arguments):.4f} ms", flush=True
            )
    for constant, value in zip((one, other), kept, strict=True):
        setattr(triton_norm, constant, value)


def main() -> None:
    """One row of the table after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweep", action="store_true", help="time other launch settings too")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    columns = ("torch.compile, ms", "GB/s", "kernel, ms", "GB/s", "worst difference")
    print(table_head("op", "rows x width", *columns, numbers=5))
    cases: list[tuple[str, tuple[int, int], int, Any, Any, Any]] = [
        (name, case[:2], case[2] + 4, norm_backward_reference, triton_norm.norm_backward_kernel, case)
        for name, case in NORMS.items()
    ]
    cases.append((*GELU, 4, gelu_backward_reference, triton_norm.gelu_backward_kernel, None))
    for name, (num_rows, width), num_tensors, plain, kernel, case in cases:
        if case:
            arguments = norm_arguments(*case)
        else:
            arguments = tuple(torch.randn(2, num_rows, width, device="cuda").bfloat16())
        by_torch = compiled(plain, enabled=True)
        copies = copy.deepcopy(arguments)  # GELU works in place
        difference = worst((*kernel(*arguments), arguments[0]), (*plain(*copies), copies[0]))
        gigabytes = num_tensors * num_rows * width * 2 / 1e9
        times = [milliseconds(function, arguments) for function in (by_torch, kernel)]
        cells = [cell for time in times for cell in (f"{time:.4f}", f"{gigabytes / time * 1e3:.0f}")]
        print(table_row(name, f"{num_rows} x {width}", *cells, f"{difference:.1e}"), flush=True)
        if args.sweep:
            sweep(name, kernel, arguments, SWEPT_NORM if case else SWEPT_GELU)


if __name__ == "__main__":
    main()
