"""The train command: ``torchrun --nproc-per-node 2 -m vl3train.train stage=2_alignment run.output_dir=runs/s2``.

From here to ``backward()`` it is two files: ``engine/loop.py`` and ``engine/step.py``.
"""

from __future__ import annotations

import sys
import traceback

from vl3train.config.load import ConfigError, load_config
from vl3train.config.schema import TrainConfig


def main(overrides: list[str] | None = None) -> int:
    """Train one stage with Hydra overrides; returns the exit code. Every rank of a launch runs this."""
    from vl3train.engine.ranks import is_first_process, join, launched_dp_size

    try:
        cfg = load_config([*(sys.argv[1:] if overrides is None else overrides)], dp_size=launched_dp_size())
    except ConfigError as error:
        if is_first_process():
            print(error, file=sys.stderr)
        return 2
    return run(cfg, join(cfg.machine))


def run(cfg: TrainConfig, rank: object) -> int:
    """Train; a refusal that the program foresaw is printed plainly, anything else with its traceback."""
    from vl3train.engine.loop import train

    train(cfg, rank)
    return 0
