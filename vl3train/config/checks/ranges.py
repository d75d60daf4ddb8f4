"""The range of every number in the schema."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from vl3train.config.problems import Problem
from vl3train.config.schema import TrainConfig


class Range(NamedTuple):
    """What a number must be, in words and as a condition."""

    words: str
    holds: Callable[[float], bool]


POSITIVE = Range("must be more than 0", lambda v: v > 0)
AT_LEAST_0 = Range("must be 0 or more", lambda v: v >= 0)
AT_LEAST_1 = Range("must be at least 1", lambda v: v >= 1)
SHARE = Range("is a share, from 0 to 1", lambda v: 0 <= v <= 1)
BELOW_1 = Range("must be at least 0 and less than 1", lambda v: 0 <= v < 1)
RATE = Range("must be between 0 and 1", lambda v: 0 < v < 1)
STAGE = Range("must be 1, 2, 3 or 4", lambda v: v in (1, 2, 3, 4))
MERGE = Range("must be 1 or 2", lambda v: v in (1, 2))  # other sides have no trained weights

RANGES: dict[str, Range] = {
    "stage.number": STAGE,
    "stage.image_merge_size": MERGE,
    "stage.video_merge_size": MERGE,
    "model.initializer_range": POSITIVE,
    "data.fps": POSITIVE,
    "data.min_frames": AT_LEAST_1,
    "data.max_frames": AT_LEAST_1,
    "data.max_visual_tokens": AT_LEAST_1,
    "data.image_min_pixels": AT_LEAST_1,
    "data.image_max_pixels": AT_LEAST_1,
    "data.video_min_pixels": AT_LEAST_1,
    "data.video_max_pixels": AT_LEAST_1,
    "data.decode_max_pixels": AT_LEAST_1,
    "data.decode_max_seconds": POSITIVE,
    "data.decode_seconds": POSITIVE,
    "data.retry_seconds": AT_LEAST_0,
    "data.remote_cache_bytes": AT_LEAST_1,
    "data.num_workers": AT_LEAST_0,
    "data.max_failed_fraction": SHARE,
    "data.max_consecutive_failed": AT_LEAST_1,
    "data.max_epoch_samples": AT_LEAST_1,
    "data.block_shards": AT_LEAST_0,
    "data.max_family_records": AT_LEAST_1,
    "step.max_tokens": AT_LEAST_1,
    "step.max_patches": AT_LEAST_1,
    "step.max_visual_items": AT_LEAST_1,
    "step.global_packs": AT_LEAST_1,
    "step.max_samples": AT_LEAST_1,
    "step.fill": Range("must be more than 0 and at most 1", lambda v: 0 < v <= 1),
    "optim.learning_rate": RATE,
    "optim.weight_decay": AT_LEAST_0,
    "optim.beta1": BELOW_1,
    "optim.beta2": BELOW_1,
    "optim.eps": POSITIVE,
    "optim.warmup_fraction": BELOW_1,
    "optim.min_lr_fraction": SHARE,
    "optim.max_grad_norm": AT_LEAST_0,
    "optim.spike_limit": AT_LEAST_0,
    "optim.max_skipped_steps": AT_LEAST_1,
    "machine.dp_size": AT_LEAST_1,
    "machine.zero_stage": Range("must be 0, 1, 2 or 3", lambda v: v in (0, 1, 2, 3)),
    "machine.loss_chunk_tokens": AT_LEAST_1,
    "adapter.rank": AT_LEAST_1,
    "adapter.alpha": POSITIVE,
    "adapter.dropout": BELOW_1,
    "adapter.learning_rate": POSITIVE,
    "finetune.predictions": AT_LEAST_0,
    "run.seed": AT_LEAST_0,
    "run.num_epochs": POSITIVE,
    "run.num_steps": AT_LEAST_1,
    "run.save_steps": AT_LEAST_1,
    "tracking.table_rows": AT_LEAST_0,
    "run.keep_checkpoints": AT_LEAST_1,
    "run.keep_every_steps": AT_LEAST_0,
    "run.patience": AT_LEAST_1,
    "run.log_steps": AT_LEAST_1,
    "run.evaluate_steps": AT_LEAST_0,
    "run.evaluate_max_new_tokens": AT_LEAST_1,
    "run.stop_after_steps": AT_LEAST_0,
    "run.max_hours": POSITIVE,
    "run.silence_seconds": POSITIVE,
    "run.start_silence_seconds": POSITIVE,
    "run.collective_timeout_seconds": POSITIVE,
}


def range_problems(cfg: TrainConfig) -> list[Problem]:
    """Every number that is out of its range. A number that is not set is in range."""
    found = []
    for key, allowed in RANGES.items():
        section, option = key.split(".")
        value = getattr(getattr(cfg, section), option)
        if value is not None and not (math.isfinite(value) and allowed.holds(value)):
            found.append(Problem(key, value, allowed.words, f"set {key} to a number in that range"))
    return found
