"""How long ranks wait for each other, and NCCL's flight recorder: the last collectives of each rank, for a post-mortem.

The report about silence comes first (engine/monitor/silence.py); NCCL's timeout then ends a job that nothing revives.
"""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import torch.distributed as dist

from vl3train.config.schema import RunConfig

TRACE_FILE = "nccl_trace_rank_"
RECORDED_COLLECTIVES = "2000"
"""A step of the 7B under ZeRO-1 has some hundred; an entry takes about 1 KiB of the host's memory."""


def record_collectives(output_dir: Path) -> None:
    """Turn the flight recorder on, where the environment does not say otherwise. Called before the ranks are joined.

    When a collective times out, each rank writes ``nccl_trace_rank_N`` into the output folder, and
    ``python -m torch.distributed.flight_recorder.fr_trace`` compares them.
    """
    for names, value in (
        (("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), RECORDED_COLLECTIVES),
        (("TORCH_NCCL_DUMP_ON_TIMEOUT",), "1"),
        (
            ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"),
            str(output_dir.absolute() / TRACE_FILE),
        ),
    ):
        if not os.environ.keys() & set(names):  # the second is the name that torch used before
            os.environ[names[0]] = value


def shorten_timeouts(run: RunConfig) -> None:
    """From the first step on let a collective wait for ``run.collective_timeout_seconds``. All ranks call it.

    DeepSpeed makes groups of its own, so every group that there is gets it.
    """
    timeout = datetime.timedelta(seconds=run.collective_timeout_seconds)
    # torch 2.14 made it public.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    for group in list(dist.distributed_c10d._world.pg_map):
        set_timeout(timeout, group)
