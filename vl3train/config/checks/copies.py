"""Whether a run may be copied to where run.upload_to says. Whether another run is there: engine/mirror/uploads.py."""

from __future__ import annotations

import re
from pathlib import Path

from vl3train.config.problems import Problem
from vl3train.config.schema import TrainConfig

NEITHER = re.compile(r"(?!\w+://)[A-Za-z]\w+:")
"""``s3:/bucket``: a path may begin so, and nobody means one."""


def copy_problems(cfg: TrainConfig) -> list[Problem]:
    """A place that is no place, or that lies in what is copied."""
    address = cfg.run.upload_to
    if address is None:
        return []

    def problem(what: str, way_out: str) -> list[Problem]:
        return [Problem("run.upload_to", address, what, way_out)]

    if not address.strip():
        return problem("is empty", "name a folder or an address, or null")
    if address.lower().startswith("memory://"):
        return problem("is the memory of this process, and gone with it", "name a place that stays")
    if NEITHER.match(address):
        return problem(
            "is no address", "write one as s3://bucket/runs/mine, and a folder of that name with ./"
        )
    path = address.removeprefix("file://")
    if "://" not in path:
        place, run = (Path(one).expanduser().resolve() for one in (path, cfg.run.output_dir))
        if place == run or run in place.parents:
            return problem("lies in run.output_dir, which is copied there", "name a folder beside it")
    return []
