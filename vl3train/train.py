"""The train command: ``torchrun --nproc-per-node 8 -m vl3train.train stage=2 model=2b run.output_dir=runs/stage2``.

From here to ``backward()`` it is two files: ``engine/loop.py`` and ``engine/step.py``.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import NoReturn

from vl3train.config.checks.launch import launched_ranks
from vl3train.config.load import add_config_arguments
from vl3train.config.paths import is_finished
from vl3train.config.problems import ConfigError
from vl3train.config.schema import TrainConfig
from vl3train.preview.check_config import check_config

EXAMPLES = """\
examples:
  torchrun --nproc-per-node 8 -m vl3train.train stage=1 model=2b run.output_dir=runs/stage1 \\
      model.vision_encoder_from=google/siglip-so400m-patch14-384 model.language_model_from=Qwen/Qwen2.5-1.5B-Instruct
  torchrun --nproc-per-node 8 -m vl3train.train stage=2 model=2b stage.init_from=runs/stage1 run.output_dir=runs/stage2
  torchrun --nproc-per-node 1 -m vl3train.train stage=3 model=2b adapter=lora data.recipe=my_recipe.yaml \\
      stage.init_from=VideoLLaMA3-2B-hf run.output_dir=runs/mine

The same command again resumes a run that did not finish. `vl3train check` with the same words checks them in a second.
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
    args = parser.parse_args(arguments)
    try:
        dp_size = launched_ranks(os.environ)
    except ConfigError as error:
        print(error, file=sys.stderr)  # by every process: which of them is the first is not known
        return 2
    try:
        cfg = check_config(args, dp_size=dp_size)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr)
        return 2
    return start(cfg)


def start(cfg: TrainConfig) -> int:
    """Join the other ranks and train. torch is imported here, not before the config is known to be right."""
    if is_finished(cfg):
        if os.environ.get("RANK", "0") == "0":
            print(f"{cfg.run.output_dir}: this run is finished; another run.output_dir starts a new one")
        return 0
    from vl3train.engine.failure import report_failure
    from vl3train.engine.ranks import join

    rank = None
    try:
        rank = join(cfg.machine)  # before DeepSpeed is imported: it reads there on which device it is to run
        from vl3train.engine.loop import train

        train(cfg, rank)
    except BaseException as error:  # whatever it is, this process ends now: the other ranks wait for it
        return report_failure(error, rank)
    return 0


def run_process() -> NoReturn:
    """``main`` as a process of its own, which ends without waiting for its loader's workers."""
    code = main()
    if "torch" not in sys.modules:  # refused, or finished before: there is no process group to leave
        sys.exit(code)
    from vl3train.engine.ranks import leave

    leave(code)


if __name__ == "__main__":
    run_process()
