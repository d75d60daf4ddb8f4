"""Measure what a token and a patch cost on this machine, and print the model.costs option for the planner.

The planner balances packs by these costs. Without this command it counts the model's arithmetic, which real
kernels follow only roughly. The command runs forward and backward passes of the stage's model over made-up packs,
on the device that the run would use, and fits the measured times. It takes about a minute on a GPU.

examples:
  vl3train calibrate stage=3 model=2b stage.init_from=runs/2b/2_alignment
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from rich.console import Console

from vl3train.cli.arguments import count
from vl3train.config.load import add_config_arguments, load_config
from vl3train.preview.calibrate import Kind, measured_costs


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``vl3train calibrate``."""
    add_config_arguments(parser)
    parser.add_argument(
        "--repeats",
        type=count,
        default=3,
        metavar="N",
        help="runs of each pack; the fastest counts (default 3)",
    )


def main(args: Namespace) -> int:
    """Print the time of each pack and the costs that fit them; returns 0."""
    cfg = load_config(args.overrides, config_file=args.config, config_dir=args.config_dir)
    console = Console(highlight=False, soft_wrap=True)

    def show(kind: Kind, seconds: float) -> None:
        console.print(
            f"{kind.samples} x {kind.tokens} tokens, {kind.samples * kind.frames} frames of {kind.side}x{kind.side} "
            f"patches: {seconds * 1e3:.1f} ms"
        )

    costs, error = measured_costs(cfg, repeats=args.repeats, progress=show)
    console.print(f"\nmean error of the fit: {error:.1%}; costs in this config: {dict(cfg.model.costs)}")
    console.print("add this to the command line:")
    line = ", ".join(f"{name}: {value}" for name, value in costs.items())
    console.print(f"model.costs={{{line}}}", markup=False)
    return 0
