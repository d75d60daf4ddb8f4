"""Fill a node's caches ahead of a job, so that its first start is as quick as a later one.

examples:
  vl3train warm
  vl3train warm stage=3 model=2b data.recipe=mine.yaml stage.init_from=VideoLLaMA3-2B-hf machine.compile_layers=true
  vl3train warm stage=1 model=debug data=demo machine=cpu --nproc 2

Without options, the code of plans and pictures is compiled, which needs neither data nor a GPU: for an image. With the
options of a run, that run is started as `vl3train train` does it, in a temporary folder, and stopped before its first
step. It has built a missing index, compared its kernels with float64 and compiled its layers for the sizes of its
packs. Give the number of ranks that the job has on a node: each GPU has files of its own. ZeRO-3 and the CPU compile
their layers in the first step only. docs/start.md has the folders, for a node that empties them between jobs.
"""

from __future__ import annotations

import tempfile
import time
from argparse import ArgumentParser, Namespace

from vl3train.cli.ranks import add_nproc, ranks_of, ranks_to_start
from vl3train.config.load import add_config_arguments
from vl3train.contracts.exit_codes import FINISHED, STOPPED
from vl3train.preview.check_config import check_config

NOT_TAKEN = (
    "run.output_dir=",
    "run.stop_after_steps=",
    "run.evaluate_at_start=",
    "run.upload_to=",
    "tracking",
)
"""Options of the job that this start has otherwise."""


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``vl3train warm``."""
    add_config_arguments(parser)
    add_nproc(parser)


def main(args: Namespace) -> int:
    """Fill the caches; returns the exit code. What is wrong with the options is a ConfigError."""
    files: list[str] = []
    for option, value in (("--config", args.config), ("--config-dir", args.config_dir)):
        files += [option, str(value)] if value is not None else []
    if not args.overrides and not files:
        compile_data_code()
        return FINISHED
    with tempfile.TemporaryDirectory(prefix="vl3train-warm-") as folder:
        words = [word for word in args.overrides if not word.startswith(NOT_TAKEN)]
        words += [f"run.output_dir={folder}/run", "run.stop_after_steps=0", "tracking=none"]
        cfg = check_config(Namespace(**{**vars(args), "overrides": words}), dp_size=ranks_of(args))
        ranks = ranks_to_start(cfg, args)
        compile_data_code()
        from vl3train.finetuning.launching import train

        code = train([*words, *files], ranks)
    if code != STOPPED:
        return code
    print("warm: a start of this run finds its index, its kernels and what is compiled", flush=True)
    return FINISHED


def compile_data_code() -> None:
    """Compile what plans steps and resizes pictures, or find it on disk."""
    print("compiling the code of plans and pictures, or finding it on disk", flush=True)
    started = time.perf_counter()
    import vl3train.data.preload  # noqa: F401 - its import is what compiles

    print(f"plans and pictures: ready after {time.perf_counter() - started:.0f} s", flush=True)
