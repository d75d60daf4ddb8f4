"""A skipped step, told: a line on the console and a file with the losses of all its samples, on all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vl3train.contracts.bad_step import BadStep, SampleLoss, dump_path, write_bad_step
from vl3train.contracts.records import Batch
from vl3train.data.pipeline import StepBatches
from vl3train.engine.run import Run
from vl3train.engine.step import NO_LIMITS, Limits, StepResult

KEYS_SHOWN = 5


def report_skipped(run: Run, step_batches: StepBatches, result: StepResult, limits: Limits) -> None:
    """Write ``bad_steps/step_*.json`` and say what happened. All ranks call it; only here they gather their samples.

    Does not raise where the disk does not take the file.
    """
    mine = sample_losses(step_batches.batches, result.token_losses, run.source_names, run.rank.index)
    samples = [sample for of_rank in run.rank.gather(mine) for sample in of_rank]
    if not run.rank.is_first:
        return
    step = step_batches.cursor.step + 1
    bad = BadStep(
        step=step,
        epoch=step_batches.cursor.epoch,
        reason=why(result, limits),
        loss=result.loss,
        grad_norm=result.grad_norm,
        part_grad_norms=result.part_norms,
        most_loss=None if limits == NO_LIMITS else limits.loss,
        most_grad_norm=None if limits == NO_LIMITS else limits.grad_norm,
        source_losses={run.source_names[i]: loss for i, loss in result.source_losses.items()},
        samples=tuple(sorted(samples, key=worst_first)),
    )
    path = dump_path(run.folder, step)
    try:
        write_bad_step(path, bad)
        kept = f"its samples and their losses are in {path} (vl3train inspect --dump {path})"
    except OSError as error:
        kept = f"its samples could not be written to {path}: {error.strerror or error}"
    told = f"step {step} is skipped and changes nothing: {bad.reason}; {suspects(bad)}{kept}"
    run.console.message(told)
    run.tracker.alert("step skipped", told, is_bad=True)


def why(result: StepResult, limits: Limits) -> str:
    """The reason in words.

    >>> one = dict(num_failed_samples=0, stop_requested=False, is_skipped=True, token_losses=[])
    >>> one |= dict(part_norms={}, source_losses={}, is_void=False)
    >>> why(StepResult(loss=math.nan, grad_norm=1.0, **one), Limits())
    'loss nan'
    >>> why(StepResult(loss=2.0, grad_norm=900.0, **one), Limits(loss=4.0, grad_norm=25.0))
    'gradient norm 900 over its limit of 25'
    """
    found = []
    numbers = ("loss", result.loss, limits.loss), ("gradient norm", result.grad_norm, limits.grad_norm)
    for name, value, most in numbers:
        if not math.isfinite(value):
            found.append(f"{name} {value}")
        elif value > most:
            found.append(f"{name} {value:.4g} over its limit of {most:.4g}")
    return ", ".join(found)


def suspects(bad: BadStep) -> str:
    """The samples whose loss is not finite, or that none is, as a part of a sentence."""
    wrong = bad.not_finite
    if not wrong:
        return "the loss of each sample is finite; " if not math.isfinite(bad.grad_norm) else ""
    shown = ", ".join(f"{sample.key} (rank {sample.rank})" for sample in wrong[:KEYS_SHOWN])
    more = f" and {len(wrong) - KEYS_SHOWN} more" if len(wrong) > KEYS_SHOWN else ""
    return f"not finite: the loss of {shown}{more}; "


def worst_first(sample: SampleLoss) -> tuple[bool, float]:
    """Order of the samples in the file: not finite first, then by falling loss."""
    if not sample.is_finite:
        return False, 0.0
    return True, math.inf if sample.loss is None else -sample.loss


def sample_losses(
    batches: Sequence[Batch], token_losses: Sequence[Tensor], source_names: Sequence[str], rank: int
) -> list[SampleLoss]:
    """The samples of one rank's micro-batches; ``token_losses`` are (U,) each."""
    found = []
    for micro_batch, (batch, losses_U) in enumerate(zip(batches, token_losses, strict=True)):
        segments_U, num_segments = batch.supervised_segments.cpu(), len(batch.segment_keys)
        sums = torch.zeros(num_segments, dtype=torch.float64).index_add_(
            0, segments_U, losses_U.double().cpu()
        )
        counts = torch.bincount(segments_U, minlength=num_segments)
        for segment, (key, source) in enumerate(zip(batch.segment_keys, batch.segment_sources, strict=True)):
            if source < 0:  # filler
                continue
            count = int(counts[segment])
            found.append(
                SampleLoss(
                    key=key,
                    source=source_names[source],
                    rank=rank,
                    micro_batch=micro_batch,
                    supervised_tokens=count,
                    loss=float(sums[segment]) / count if count else None,
                )
            )
    return found
