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
    """Sum of the losses (0-d, float32, differentiable), each token's loss (U,) and whether argmax hits (U,).

    ``hidden`` (T, H) are the final states, ``positions`` (U,) the tokens supervised, ``labels`` (U,) their
    next ids. ``lm_head`` is called exactly ``num_chunks`` times, however many tokens there are: under
    ZeRO-3 each call gathers its weights from all ranks, so all ranks must make as many. Logits are
    recomputed in the backward pass; those of one chunk exist at a time. ``score`` is ``score_logits``, compiled or
    not: left alone, torch reads and writes the wide vocabulary ten times over, half of them in float32.
    """
    _refuse_odd_lots(positions, labels, num_chunks)
    num_supervised_tokens = positions.shape[0]
    chunk_tokens = -(-num_supervised_tokens // num_chunks)
    sums, losses, hits = [], [], []
    for chunk in range(num_chunks):
        rows = slice(chunk * chunk_tokens, (chunk + 1) * chunk_tokens)
        positions_U, labels_U = positions[rows], labels[rows].clone()  # as below
        empty = positions_U.shape[0] == 0
        if empty:
            # Any token with any label, counted zero times: the head is fetched, recomputed and freed as in
            # every other chunk. One fetch less on one rank, and ZeRO-3 mixes up its messages (seen with 2
            # ranks).
            positions_U = labels_U = positions.new_zeros(1)
        # Recomputation runs to its end, so that the forward hooks with which ZeRO-3 frees the weights fire.
        with set_checkpoint_early_stop(False):
            chunk_sum, losses_U, hits_U = checkpoint(
                _chunk_loss, hidden, lm_head, score, positions_U, labels_U, use_reentrant=False
            )
        sums.append(chunk_sum * 0 if empty else chunk_sum)
        losses.append(losses_U[:0] if empty else losses_U)
        hits.append(hits_U[:0] if empty else hits_U)
    return torch.stack(sums).sum(), torch.cat(losses), torch.cat(hits)


def _refuse_odd_lots(positions: Tensor, labels: Tensor, num_chunks: int) -> None:
    if num_chunks < 1:
        raise ValueError(f"num_loss_chunks={num_chunks}: at least 1, so that every rank calls the head")
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
    """``supervised_loss`` that makes the gradients while it has the logits, and so never makes those again.

    For a head whose weight is whole on every rank: not under ZeRO-3, where the module has to be called to fetch it.
    ``grade`` is ``grade_logits``, compiled or not.
    """
    _refuse_odd_lots(positions, labels, num_chunks)
    if lm_head.bias is not None:
        raise ValueError("the language model's head has a bias, whose gradient nothing makes here")
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
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(hidden) if of_hidden else None
        d_weight = None
        losses, hits = [hidden.new_empty(0, dtype=torch.float32)], [labels.new_empty(0, dtype=torch.bool)]
        chunk_tokens = max(1, -(-len(positions) // num_chunks))
        for positions_U, labels_U in zip(
            positions.split(chunk_tokens), labels.split(chunk_tokens), strict=True
        ):
            if not len(positions_U):
                continue  # split gives one empty part of nothing
            rows_UH = hidden.index_select(0, positions_U)
            # A copy: the compiler takes a view as long as what it is a view of for a kind of its own.
            losses_U, hits_U, d_logits_UV = grade(F.linear(rows_UH, weight), labels_U.clone())
            losses.append(losses_U)
            hits.append(hits_U)
            if d_hidden is not None:
                d_hidden.index_copy_(0, positions_U, d_logits_UV @ weight)
            if of_weight and d_weight is None:
                d_weight = d_logits_UV.t() @ rows_UH
            elif d_weight is not None:
                d_weight.addmm_(d_logits_UV.t(), rows_UH)
        if of_weight and d_weight is None:
            d_weight = torch.zeros_like(weight)
        ctx.save_for_backward(d_hidden, d_weight)
        losses_U, hits_U = torch.cat(losses), torch.cat(hits)
        ctx.mark_non_differentiable(losses_U, hits_U)
        return losses_U.sum(), losses_U, hits_U

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # In place: nobody else has them, and the weight's is the largest of all gradients.
        d_hidden, d_weight = (None if d is None else d.mul_(grad) for d in ctx.saved_tensors)
        return d_hidden, d_weight, None, None, None, None


def grade_logits(logits_UV: Tensor, labels_U: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``score_logits``, and the gradient of the losses' sum with respect to the logits (U, V), in their dtype."""
    log_shares_UV = F.log_softmax(logits_UV.float(), 1)
    losses_U = F.nll_loss(log_shares_UV, labels_U, reduction="none")
    places_V = torch.arange(logits_UV.shape[1], device=logits_UV.device)
    d_logits_UV = log_shares_UV.exp() - (places_V == labels_U[:, None]).float()
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
