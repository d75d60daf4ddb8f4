"""One optimizer step, as the sentence that defines it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vl3train.contracts.progress.record import progress
from vl3train.contracts.records import Batch
from vl3train.engine.zero.engine import Zero


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step did, over all ranks."""

    loss: float  # mean over every supervised token of the global batch
    grad_norm: float  # before clipping
    part_norms: dict[str, float]  # the same of each part that trains
    source_losses: dict[int, float]  # mean over the supervised tokens of each source
    num_failed_samples: int
    stop_requested: bool  # a rank was asked to stop (SIGTERM)
    is_skipped: bool  # loss or norm were not finite or over their limits: weights and optimizer are as before
    is_void: bool  # a rank gave up the wait for its data: it is skipped, too, and none of its numbers counts
    token_losses: list[Tensor]  # of each micro-batch of this rank, (U,) on the device


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most that a step's loss and gradient norm may be. A number that is not finite is over any limit."""

    loss: float = sys.float_info.max
    grad_norm: float = sys.float_info.max


NO_LIMITS = Limits()

VOID = 2**20
"""What a rank without data adds to the number of ranks that want to stop; there are fewer ranks."""


def train_step(
    engine: Zero,
    micro_batches: Sequence[Batch],
    *,
    num_supervised_tokens: int,
    num_sources: int,
    stop_requested: bool,
    is_blank: bool = False,
    limits: Limits = NO_LIMITS,
) -> StepResult:
    """One optimizer step over one global batch, or none: a step whose loss or gradient norm is over ``limits``
    changes nothing. The device decides that, so the host does not wait for it. With ``is_blank`` this rank had no data,
    and the step changes nothing either.

    The loss is the sum over every supervised token of the global batch divided by their number, known from the
    plan, so how tokens fall into micro-batches and ranks cannot change a gradient.
    """
    device = engine.rank.device
    num_failed = sum(batch.num_failed_samples for batch in micro_batches)
    totals = torch.zeros(2 + 2 * num_sources, dtype=torch.float64, device=device)
    numbers = [num_failed, stop_requested + VOID * is_blank, limits.loss, limits.grad_norm]
    sent = to_device(torch.tensor(numbers, dtype=torch.float64), device)
    totals[:2], allowed = sent[:2], sent[2:]
    token_losses: list[Tensor] = []
    for position, batch in enumerate(micro_batches):
        first, last = position == 0, position == len(micro_batches) - 1
        # Before the forward pass: a GPU copies each way in the order in which it was asked, and in the last forward
        # pass optimizer state comes in.
        sources_U = supervised_sources(batch, device)
        progress.phase("forward", micro_batch=position)
        output = engine.forward(batch, first=first, last=last)
        token_losses.append(output.token_losses)
        totals[2:] += losses_by_source(output.token_losses, sources_U, num_sources)
        if not last:
            engine.prefetch(micro_batches[position + 1])
        progress.phase("backward", micro_batch=position)
        engine.backward(output.loss_sum / max(num_supervised_tokens, 1))
        if not last:
            engine.finish_micro_batch()

    def is_bad(summed: Tensor, norm: Tensor) -> Tensor:
        loss = summed[2 : 2 + num_sources].sum() / max(num_supervised_tokens, 1)
        is_good = (torch.stack([loss, norm]) <= allowed).all()  # of NaN, no comparison holds
        return ~(is_good & (summed[1] < VOID))

    progress.phase("optimizer")
    # One wait for the device, here.
    read = engine.step(totals, is_bad).wait()
    sums, (grad_norm, *part_norms, is_skipped) = read[: len(totals)], read[len(totals) :]
    engine.end_step(is_skipped=bool(is_skipped))
    losses, counts = sums[2 : 2 + num_sources], sums[2 + num_sources :]
    return StepResult(
        loss=sum(losses) / max(num_supervised_tokens, 1),
        grad_norm=grad_norm,
        part_norms=dict(zip(engine.parts, part_norms, strict=True)),
        source_losses={
            source: loss / count
            for source, (loss, count) in enumerate(zip(losses, counts, strict=True))
            if count
        },
        num_failed_samples=int(sums[0]),
        stop_requested=bool(sums[1]),
        is_skipped=bool(is_skipped),
        is_void=sums[1] >= VOID,
        token_losses=token_losses,
    )


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host, on ``device``. Page-locked first: else the host would wait for the backward pass."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def supervised_sources(batch: Batch, device: torch.device) -> Tensor:
    """(U,) int64 on the device, the source of each supervised token."""
    source_of_segment_S = torch.tensor(batch.segment_sources).clamp(min=0)
    return to_device(source_of_segment_S[batch.supervised_segments], device)


def losses_by_source(token_losses_U: Tensor, sources_U: Tensor, num_sources: int) -> Tensor:
    """Sums of the token losses of each source, then numbers of their tokens: (2 * num_sources,) float64."""
    result = torch.zeros(2 * num_sources, dtype=torch.float64, device=token_losses_U.device)
    result[:num_sources].index_add_(0, sources_U, token_losses_U.double())
    result[num_sources:].index_add_(0, sources_U, torch.ones_like(token_losses_U, dtype=torch.float64))
    return result
