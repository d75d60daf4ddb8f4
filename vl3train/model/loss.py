"""Cross-entropy on supervised tokens only, a chunk of logits at a time.

T tokens, H hidden size, U supervised tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

Score = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Grade = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def supervised_loss(
    hidden: Tensor, lm_head: nn.Module, score: Score, positions: Tensor, labels: Tensor, num_chunks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses (0-d, float32, differentiable), each token's loss (U,), whether argmax is the label (U,).

    ``hidden`` (T, H) are the final states, ``positions`` (U,) the supervised tokens, ``labels`` (U,) their next ids.
    ``lm_head`` is called exactly ``num_chunks`` times, however many tokens there are: under ZeRO-3 each call gathers
    its weights from all ranks, so all ranks must make the same number of calls. Logits are recomputed in the backward
    pass; only those of one chunk exist at a time. ``score`` is ``score_logits``, compiled or not: uncompiled, torch
    reads and writes the logits ten times, half of them in float32. Raises ValueError for no chunks, or when
    ``positions`` and ``labels`` differ in length.
    """
    _check_sizes(positions, labels, num_chunks)
    num_supervised_tokens = positions.shape[0]
    chunk_tokens = -(-num_supervised_tokens // num_chunks)
    sums, losses, hits = [], [], []
    for chunk in range(num_chunks):
        rows = slice(chunk * chunk_tokens, (chunk + 1) * chunk_tokens)
        positions_U, labels_U = positions[rows], labels[rows].clone()  # a copy, as in _LossWithGradients
        empty = positions_U.shape[0] == 0
        if empty:
            # Any token with any label, counted zero times: the head is gathered, recomputed and freed as in every
            # other chunk. With one gather less on one rank, ZeRO-3 mixes up its messages (seen with 2 ranks).
            positions_U = labels_U = positions.new_zeros(1)
        # Recompute to the end of the chunk: the forward hooks there free the weights under ZeRO-3.
        with set_checkpoint_early_stop(False):
            chunk_sum, losses_U, hits_U = checkpoint(
                _chunk_loss, hidden, lm_head, score, positions_U, labels_U, use_reentrant=False
            )
        sums.append(chunk_sum * 0 if empty else chunk_sum)
        losses.append(losses_U[:0] if empty else losses_U)
        hits.append(hits_U[:0] if empty else hits_U)
    return torch.stack(sums).sum(), torch.cat(losses), torch.cat(hits)


def _check_sizes(positions: Tensor, labels: Tensor, num_chunks: int) -> None:
    if num_chunks < 1:
        raise ValueError(f"num_loss_chunks={num_chunks}: it is at least 1, so that every rank calls the head")
    if positions.shape != labels.shape:
        raise ValueError(f"{tuple(positions.shape)} supervised positions for {tuple(labels.shape)} labels")


def loss_with_gradients(
    hidden: Tensor,
    lm_head: nn.Linear,
    grade: Grade,
    positions: Tensor,
    labels: Tensor,
    num_chunks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``supervised_loss``, which computes the gradients while it has the logits and so never recomputes them.

    For a head whose weight is whole on every rank: not under ZeRO-3, which gathers it only when the module is called.
    ``grade`` is ``grade_logits``, compiled or not. Raises ValueError as ``supervised_loss``, or for a head with a bias.
    """
    _check_sizes(positions, labels, num_chunks)
    if lm_head.bias is not None:
        raise ValueError("the language model's head has a bias, and this loss computes no gradient for it")
    total, losses_U, hits_U = _LossWithGradients.apply(
        hidden, lm_head.weight, grade, positions, labels, num_chunks
    )
    return total, losses_U, hits_U


class _LossWithGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        grade: Grade,
        positions: Tensor,
        labels: Tensor,
        num_chunks: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_weight = None
        losses, hits = [hidden.new_empty(0, dtype=torch.float32)], [labels.new_empty(0, dtype=torch.bool)]
        chunk_tokens = max(1, -(-len(positions) // num_chunks))
        for positions_U, labels_U in zip(
            positions.split(chunk_tokens), labels.split(chunk_tokens), strict=True
        ):
            if not len(positions_U):
                continue  # split of an empty tensor gives one empty part
            rows_UH = hidden.index_select(0, positions_U)
            # A copy: torch.compile compiles again for a view that is as long as its base.
            losses_U, hits_U, d_logits_UV = grade(F.linear(rows_UH, weight), labels_U.clone())
            losses.append(losses_U)
            hits.append(hits_U)
            if d_hidden is not None:
                d_hidden.index_copy_(0, positions_U, d_logits_UV @ weight)
            if needs_weight and d_weight is None:
                d_weight = d_logits_UV.t() @ rows_UH
            elif d_weight is not None:
                d_weight.addmm_(d_logits_UV.t(), rows_UH)
        if needs_weight and d_weight is None:
            d_weight = torch.zeros_like(weight)
        ctx.save_for_backward(d_hidden, d_weight)
        losses_U, hits_U = torch.cat(losses), torch.cat(hits)
        ctx.mark_non_differentiable(losses_U, hits_U)
        return losses_U.sum(), losses_U, hits_U

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # In place: nothing else reads them, and the weight's gradient is the largest of all.
        d_hidden, d_weight = (None if d is None else d.mul_(grad) for d in ctx.saved_tensors)
        return d_hidden, d_weight, None, None, None, None


def grade_logits(logits_UV: Tensor, labels_U: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``score_logits``, and the gradient of the losses' sum with respect to the logits (U, V), in their dtype."""
    log_probs_UV = F.log_softmax(logits_UV.float(), 1)
    losses_U = F.nll_loss(log_probs_UV, labels_U, reduction="none")
    ids_V = torch.arange(logits_UV.shape[1], device=logits_UV.device)
    d_logits_UV = log_probs_UV.exp() - (ids_V == labels_U[:, None]).float()
    return losses_U, logits_UV.argmax(-1) == labels_U, d_logits_UV.to(logits_UV.dtype)


def _chunk_loss(
    hidden: Tensor, lm_head: nn.Module, score: Score, positions_U: Tensor, labels_U: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    losses_U, hits_U = score(lm_head(hidden.index_select(0, positions_U)), labels_U)
    return losses_U.sum(), losses_U.detach(), hits_U


def score_logits(logits_UV: Tensor, labels_U: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in float32 (U,), and whether the label has the highest logit (U,)."""
    losses_U = F.cross_entropy(logits_UV.float(), labels_U, reduction="none")
    return losses_U, logits_UV.detach().argmax(-1) == labels_U
