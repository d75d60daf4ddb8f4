"""The figures of one step, and where they go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vl3train.contracts.records import Batch
from vl3train.data.pipeline import StepBatches
from vl3train.engine.monitor.compile_log import Compiles
from vl3train.engine.run import Run
from vl3train.engine.step import StepResult
from vl3train.model.activations.work import RecomputePlan


def log_step(
    run: Run,
    step_batches: StepBatches,
    result: StepResult,
    rates: dict[str, float],
    compiles: Compiles,
    waited_seconds: float,
    step_seconds: float,
) -> None:
    """Send one step's figures to console, metrics.jsonl and tracker. Seconds are wall-clock, data wait included.

    Tokens and patches a second count the time for which training has waited for saves since the line before.
    """
    memory = torch.cuda.max_memory_allocated() / 2**30 if run.rank.device.type == "cuda" else None
    done = step_batches.cursor.step + 1
    save_seconds = run.saver.take_waited_seconds()
    all_seconds = step_seconds + save_seconds / run.cfg.run.log_steps
    figures: dict[str, Any] = {
        "step": done,
        "epoch": step_batches.cursor.epoch,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "part_grad_norms": result.part_norms,
        **({"skipped": True} if result.is_skipped else {}),
        "learning_rates": rates,
        "source_losses": {run.source_names[i]: loss for i, loss in result.source_losses.items()},
        "tokens": step_batches.num_tokens,
        "supervised_tokens": step_batches.num_supervised_tokens,
        "patches": step_batches.num_patches,
        "fill": step_batches.fill,
        "failed_samples": result.num_failed_samples,
        "step_seconds": step_seconds,
        "tokens_per_second": step_batches.num_tokens / all_seconds,
        "patches_per_second": step_batches.num_patches / all_seconds,
        "save_seconds": save_seconds,
        "data_wait_fraction": waited_seconds / step_seconds,
        "compile_seconds": compiles.seconds,
        "recompiles": compiles.graphs,
        "memory_gib": memory,
        **run.meter.figures(
            step_batches.batches,
            recompute_plans(run, step_batches.batches),
            step_seconds,
        ),
    }
    run.console.metrics(figures)
    run.tracker.log(figures, done)


def recompute_plans(run: Run, batches: Sequence[Batch]) -> list[RecomputePlan]:
    """What each layer recomputed in each micro-batch of this rank."""
    last = len(batches) - 1
    return [
        run.engine.plan_of(batch, first=number == 0, last=number == last)
        for number, batch in enumerate(batches)
    ]
