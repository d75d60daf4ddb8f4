"""Compare the kernels on this machine with float64, for the shapes that VideoLLaMA3 has.

Each available backend of attention runs with the heads of the encoder (72 wide, no mask) and of the 2B and 7B language
models (128 wide, causal); quack's products run for their rows and weights. Out of line: a figure over 0.01. Exit code 1
when a kernel that machine.attention=auto or machine.gemm_backend=auto would take is wrong here.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # torch takes seconds to import, and --help needs none of it
    import torch

SHAPES = {
    "encoder": (16, 16, 72, False),
    "language model 2B": (12, 2, 128, True),
    "language model 7B": (28, 4, 128, True),
}
"""Query heads, key and value heads, head dimension, causal."""
MLPS = {"encoder": (1152, 4304), "language model 2B": (1536, 8960), "language model 7B": (3584, 18944)}
"""Values of a row, and of a row between the MLP's products."""


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``vl3train kernels``."""
    parser.add_argument(
        "--check", action="store_true", help="run every backend, not only say which can serve"
    )


def main(args: Namespace) -> int:
    """Print the table; 1 when what ``auto`` takes is wrong."""
    import torch

    from vl3train.model.attention.backends import BACKENDS, choose_attention
    from vl3train.model.attention.check import check_kernel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    head_dims = [shape[2] for shape in SHAPES.values()]
    chosen = choose_attention("auto", device, head_dims, dtype)
    console = Console(highlight=False)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    console.print(f"{where}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}")
    console.print(f"auto takes {chosen.name} ({chosen.reason})")
    if not args.check:
        return 0
    table = Table("backend", "shape", "out", "dq", "dk", "dv", "")
    wrong = False
    for backend in BACKENDS:
        try:
            choose_attention(backend, device, head_dims, dtype)
        except ValueError as error:
            table.add_row(backend, "", "", "", "", "", str(error).split(": it ")[-1].split(";")[0])
            continue
        for name, (heads, kv_heads, dim, causal) in SHAPES.items():
            found = check_kernel(
                backend, device, heads=heads, kv_heads=kv_heads, head_dim=dim, causal=causal, dtype=dtype
            )
            verdict = "right" if found.is_right else found.failed or "WRONG: do not train with it"
            wrong |= backend == chosen.name and not found.is_right
            table.add_row(backend, name, *(f"{error:.4f}" for error in found.errors.values()), verdict)
    console.print(table)
    return int(wrong | wrong_gemms(console, device, dtype))


def wrong_gemms(console: Console, device: torch.device, dtype: torch.dtype) -> bool:
    """Print quack's table, or why there is none; whether one of its products is wrong."""
    from vl3train.model.kernels.check import GemmShapes, gemm_errors, why_not_quack

    all_shapes = {
        name: GemmShapes(*widths, gated=name != "encoder", heads=SHAPES[name][:3])
        for name, widths in MLPS.items()
    }
    if problem := why_not_quack(list(all_shapes.values()), device, dtype, compiled=True):
        console.print(f"products: torch; not quack, {problem}")
        return False
    table, wrong = Table("quack's product", "shape", "error", ""), False
    for shape, widths in all_shapes.items():
        for found in gemm_errors(widths, device, dtype):
            wrong |= not found.is_right
            verdict = found.failed or "WRONG: machine.gemm_backend=auto takes torch"
            table.add_row(found.name, shape, f"{found.error:.4f}", "right" if found.is_right else verdict)
    console.print(table)
    return wrong
