"""Train one stage on all GPUs of this machine. The command checks the config, then starts the ranks with torchrun.

examples:
  vl3train train stage=1 model=debug data=demo machine=cpu --nproc 2
  vl3train train stage=3 model=2b adapter=lora data.recipe=mine.yaml stage.init_from=VideoLLaMA3-2B-hf

Give the same command again to resume a run that has not finished. Ctrl-C, SIGTERM, SIGUSR1, SIGHUP and run.max_hours
save at the end of the step and stop the run with exit code 75; 0 means finished, anything else failed. For several
nodes use scripts/launch_slurm.sh.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace

from vl3train.config.load import add_config_arguments
from vl3train.preview.check_config import check_config


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``vl3train train``."""
    add_config_arguments(parser)
    parser.add_argument(
        "--nproc", type=int, help="processes (default: the number of GPUs, or 1 without a GPU)"
    )


def main(args: Namespace) -> int:
    """Check the config, then become the launcher. Returns only when the config is wrong, by ConfigError."""
    nproc = args.nproc or gpu_count() or 1
    check_config(args, dp_size=nproc)
    words = list(args.overrides)
    for option, value in (("--config", args.config), ("--config-dir", args.config_dir)):
        words += [option, str(value)] if value is not None else []
    launch = ["-m", "vl3train.launch", "--standalone", "--nproc-per-node", str(nproc)]
    os.execv(sys.executable, [sys.executable, *launch, "-m", "vl3train.train", *words])


def gpu_count() -> int:
    """GPUs that torch sees."""
    import torch

    return torch.cuda.device_count()
