"""One process of a job that does several runs one after the other, because to start one takes longer than all of them.

Run as ``torchrun --nproc-per-node N runs_worker.py RUNS``; RUNS is a JSON list of the options of each run.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from pathlib import Path

from vl3train.engine.loop import train
from vl3train.engine.ranks import join, leave
from vl3train.preview.check_config import check_config


def main() -> None:
    """Every run, to its end or to its stop."""
    for words in json.loads(Path(sys.argv[1]).read_text()):
        overrides = Namespace(overrides=words, config=None, config_dir=None)
        cfg = check_config(overrides, dp_size=int(os.environ["WORLD_SIZE"]))
        train(cfg, join(cfg.machine))
    leave()


if __name__ == "__main__":
    main()
