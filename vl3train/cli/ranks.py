"""How many ranks a run has: `train`, `check`, `plan` and others count them alike."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from vl3train.cli.arguments import count

GPU_DEVICES = ("nvidia[0-9]*", "kfd", "dxg")
"""Files in /dev where there is a GPU: of NVIDIA's driver, of AMD's, of Windows'. Without one we need not ask torch."""


def add_nproc(parser: ArgumentParser) -> None:
    """The argument ``--nproc``."""
    parser.add_argument(
        "--nproc",
        type=count,
        metavar="N",
        help="ranks (default: machine.dp_size if you write it, else the GPUs of this machine, else machine.dp_size as "
        "the chosen machine has it)",
    )


def ranks_of(args: Namespace) -> int | None:
    """The ranks of a run on this machine; None: as many as machine.dp_size says."""
    if args.nproc is not None:
        return int(args.nproc)
    if any(word.startswith("machine.dp_size=") for word in args.overrides):
        return None
    return gpu_count() or None


def gpu_count() -> int:
    """GPUs that torch sees."""
    if not any(next(Path("/dev").glob(pattern), None) for pattern in GPU_DEVICES):
        return 0
    import torch

    return torch.cuda.device_count()
