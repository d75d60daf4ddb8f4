"""Train one stage on all GPUs of this machine. The command checks the config, then starts the ranks with torchrun.

examples:
  vl3train train stage=1 model=debug data=demo machine=cpu --nproc 2
  vl3train train stage=3 model=2b adapter=lora data.recipe=mine.yaml stage.init_from=VideoLLaMA3-2B-hf
  vl3train train -m stage=3 model=debug adapter=lora adapter.rank=8,64 optim.learning_rate=1e-4,3e-4 stage.init_from=DIR

With -m each option may have several values, as a,b,c or range(1,4): each combination is a run of its own, one after the
other, in a folder below run.output_dir that is named by what differs. A table and results.csv say what they reached.

Give the same command again to resume a run that has not finished. Ctrl-C, SIGTERM, SIGUSR1, SIGHUP and run.max_hours
save at the end of the step and stop the run with exit code 75; 0 means finished, anything else failed. For several
nodes use scripts/launch_slurm.sh.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace

from vl3train.cli.ranks import add_nproc, ranks_of, ranks_to_start
from vl3train.config.input.sweeps import sweep_points
from vl3train.config.load import add_config_arguments
from vl3train.config.schema import TrainConfig
from vl3train.preview.check_config import check_config


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``vl3train train``."""
    add_config_arguments(parser)
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="train a run with each combination of several values"
    )
    add_nproc(parser)


def main(args: Namespace) -> int:
    """Check the config, then become the launcher. Returns after a sweep only; what is wrong is a ConfigError."""
    files: list[str] = []
    for option, value in (("--config", args.config), ("--config-dir", args.config_dir)):
        files += [option, str(value)] if value is not None else []
    if args.multirun:
        return sweep(args, files)
    cfg = check_config(args, dp_size=ranks_of(args))
    words = [*args.overrides, *files]
    launch = ["-m", "vl3train.launch", "--standalone", "--nproc-per-node", str(ranks_to_start(cfg, args))]
    os.execv(sys.executable, [sys.executable, *launch, "-m", "vl3train.train", *words])


def sweep(args: Namespace, files: list[str]) -> int:
    """Train a run with each combination of values; returns the exit code. ``files`` are words of the command line."""
    from vl3train.finetuning.launching import train
    from vl3train.sweeps.run import run_sweep, swept_runs

    ranks = ranks_of(args)

    def check(words: list[str]) -> TrainConfig:
        return check_config(Namespace(**{**vars(args), "overrides": words}), dp_size=ranks)

    runs = swept_runs(sweep_points(args.overrides), check)
    for run in runs:
        ranks_to_start(run.cfg, args)  # refuses what cannot start, before the first begins
    return run_sweep(runs, lambda run: train([*run.words, *files], ranks_to_start(run.cfg, args)), tell)


def tell(line: str) -> None:
    """A line for the person, at once: the training's own lines come from other processes."""
    print(line, flush=True)
