"""The train command: ``torchrun --nproc-per-node 8 -m vl3train.train stage=2 model=2b run.output_dir=runs/stage2``.

From here to ``backward()`` there are two files: ``engine/loop.py`` and ``engine/step.py``.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import NoReturn

from vl3train.config.checks.launch import launched_ranks
from vl3train.config.load import add_config_arguments
from vl3train.config.paths import is_finished
from vl3train.config.problems import ConfigError
from vl3train.config.schema import TrainConfig
from vl3train.contracts.exit_codes import FINISHED, STOPPED, left_code
from vl3train.contracts.imports.lean import import_leanly, no_garbage
from vl3train.contracts.line_log import let_output_fail
from vl3train.contracts.progress.job import keep_record_of_rank
from vl3train.contracts.progress.record import progress
from vl3train.data.render.processes import start_workers_ignoring_signals
from vl3train.preview.check_config import check_config

EXAMPLES = """\
examples:
  torchrun --nproc-per-node 8 -m vl3train.train stage=1 model=2b run.output_dir=runs/stage1 \\
      model.vision_encoder_from=google/siglip-so400m-patch14-384 model.language_model_from=Qwen/Qwen2.5-1.5B-Instruct
  torchrun --nproc-per-node 8 -m vl3train.train stage=2 model=2b stage.init_from=runs/stage1 run.output_dir=runs/stage2
  torchrun --nproc-per-node 1 -m vl3train.train stage=3 model=2b adapter=lora data.recipe=my_recipe.yaml \\
      stage.init_from=VideoLLaMA3-2B-hf run.output_dir=runs/mine

Run the same command again to resume a run that did not finish. `vl3train check` with the same options checks them in
a second, without a GPU.
"""


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments of the train command."""
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    add_config_arguments(parser)


def main(arguments: list[str] | None = None) -> int:
    """Train one stage; returns the exit code. Every process of a launch runs this."""
    parser = ArgumentParser(prog="python -m vl3train.train", description="Train one stage.")
    add_arguments(parser)
    args = parser.parse_intermixed_args(arguments)
    try:
        dp_size = launched_ranks(os.environ)
    except ConfigError as error:
        print(error, file=sys.stderr)  # by every process: no rank is known yet
        return 2
    try:
        cfg = check_config(args, dp_size=dp_size)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr)
        return 2
    return start(cfg)


def start(cfg: TrainConfig) -> int:
    """Join the other ranks and train; returns the exit code. torch is imported here, after the config is checked."""
    if left_code() == STOPPED:  # torchrun's --max-restarts takes a stop for a failure
        return STOPPED
    try:
        finished = is_finished(cfg)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr)
        return 2
    if finished:
        if os.environ.get("RANK", "0") == "0":
            print(
                f"{cfg.run.output_dir}: this run is finished; name another run.output_dir to start a new one"
            )
        return 0
    if os.environ.get("RANK", "0") == "0":
        print("importing torch, DeepSpeed and transformers", flush=True)
    import_leanly()
    start_workers_ignoring_signals()  # they import what they need while this process does
    with no_garbage():
        from vl3train.engine.failure import report_failure
        from vl3train.engine.monitor.collectives import record_collectives
        from vl3train.engine.ranks import join
    rank = None
    try:
        keep_record_of_rank()
        progress.phase("start: joining the other ranks")
        record_collectives(Path(cfg.run.output_dir))
        rank = join(cfg.machine)  # before DeepSpeed is imported: it reads the device from the environment
        with no_garbage():
            from vl3train.model.kernels.prove import prove_early

            proving = prove_early(cfg, rank.device)
            from vl3train.engine.loop import train

        return FINISHED if train(cfg, rank, proving) else STOPPED
    except BaseException as error:  # any exception ends this process now: the other ranks wait for it
        return report_failure(error, rank)


def run_process() -> NoReturn:
    """Run ``main`` and end the process without waiting for its loader's workers."""
    let_output_fail()
    code = main()
    if (
        "torch" not in sys.modules
    ):  # the config was refused, or the run is finished: there is no process group
        sys.exit(code)
    from vl3train.engine.ranks import leave

    leave(code)


if __name__ == "__main__":
    run_process()
