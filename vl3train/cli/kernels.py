"""Compare the kernels on this machine with float64, for the shapes that VideoLLaMA3 has.

Every backend of attention that can run here is run with the heads of the encoder (head dimension 72, full attention)
and of the 2B and 7B language models (128, causal). quack's matrix products are run with their rows and weights. A
kernel is wrong when a relative error is over 0.01. The exit code is 1 when a kernel that machine.attention=auto or
machine.gemm_backend=auto would take is wrong here. Each is run anew; a run that trains remembers which were right.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from vl3train.contracts.shapes import ENCODER, LANGUAGE_MODELS

if TYPE_CHECKING:  # torch takes seconds to import, and --help needs none of it
    import torch

TOWERS = {
    "encoder": ENCODER,
    "language model 2B": LANGUAGE_MODELS["2b"],
    "language model 7B": LANGUAGE_MODELS["7b"],
}


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``vl3train kernels``."""
    parser.add_argument(
        "--check", action="store_true", help="run every backend; without it, say only which one is taken"
    )


def main(args: Namespace) -> int:
    """Print the tables; 1 when what ``auto`` takes is wrong."""
    import torch

    from vl3train.model.attention.backends import choose_attention

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = choose_attention("auto", device, head_dims(), dtype)
    console = Console(highlight=False)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    console.print(f"{where}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}")
    console.print(f"attention: auto takes {chosen.name} ({chosen.reason})")
    if not args.check:
        return 0
    wrong_attention = check_attention(console, device, dtype, chosen.name)
    return int(check_gemms(console, device, dtype) or wrong_attention)


def head_dims() -> list[int]:
    """Head dimensions of all towers."""
    return [shape.head_dim for shape in TOWERS.values()]


def check_attention(console: Console, device: torch.device, dtype: torch.dtype, chosen: str) -> bool:
    """Print the table of the attention backends; whether the ``chosen`` one is wrong."""
    from vl3train.model.attention.backends import BACKENDS, choose_attention
    from vl3train.model.attention.check import proven_kernel

    table = Table("backend", "shape", "out", "dq", "dk", "dv", "")
    wrong = False
    for backend in BACKENDS:
        try:
            choose_attention(backend, device, head_dims(), dtype)
        except ValueError as error:
            table.add_row(backend, "", "", "", "", "", str(error).split(": it ")[-1].split(";")[0])
            continue
        for name, shape in TOWERS.items():
            found = proven_kernel(backend, device, shape, dtype, shares_prefix=False, anew=True)
            verdict = "right" if found.is_right else found.failed or "WRONG: do not train with it"
            wrong |= backend == chosen and not found.is_right
            table.add_row(backend, name, *(f"{error:.4f}" for error in found.errors.values()), verdict)
    console.print(table)
    return wrong


def check_gemms(console: Console, device: torch.device, dtype: torch.dtype) -> bool:
    """Print the table of quack's matrix products, or why there is none; whether one of them is wrong."""
    from vl3train.model.kernels.check import proven_gemms, why_not_quack

    if problem := why_not_quack(list(TOWERS.values()), device, dtype, compiled=True):
        console.print(f"matrix products: auto takes torch; not quack, {problem}")
        return False
    table, wrong = Table("quack's op", "shape", "error", ""), False
    for name, shape in TOWERS.items():
        for found in proven_gemms(shape, device, dtype, anew=True):
            wrong |= not found.is_right
            verdict = found.failed or "WRONG: machine.gemm_backend=auto takes torch"
            table.add_row(found.name, name, f"{found.error:.4f}", "right" if found.is_right else verdict)
    console.print(table)
    return wrong
