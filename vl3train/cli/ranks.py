"""How many ranks a run has: `train`, `check`, `plan` and others count them alike."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from vl3train.cli.arguments import count
from vl3train.config.choices import Device
from vl3train.config.problems import ConfigError, Problem
from vl3train.config.schema import TrainConfig

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
    if _written(args):
        return None
    return gpu_count() or None


def ranks_to_start(cfg: TrainConfig, args: Namespace) -> int:
    """The processes that a launch starts here. ``cfg`` has been made for the ranks of ``ranks_of``.

    Raises ConfigError where the chosen machine has several GPUs, this one has none, and nobody asks for the CPU.
    """
    machine = cfg.machine
    if (
        machine.dp_size > 1
        and machine.device is Device.auto
        and ranks_of(args) is None
        and not _written(args)
    ):
        what = "the ranks of the chosen machine, and this one has no GPU"
        way_out = "--nproc N starts N processes on the CPU; machine=one_cpu and machine=cpu are made for it"
        raise ConfigError([Problem("machine.dp_size", machine.dp_size, what, way_out)])
    return machine.dp_size


def _written(args: Namespace) -> bool:
    return any(word.startswith("machine.dp_size=") for word in args.overrides)


def gpu_count() -> int:
    """GPUs that torch sees."""
    if not any(next(Path("/dev").glob(pattern), None) for pattern in GPU_DEVICES):
        return 0
    import torch

    return torch.cuda.device_count()
