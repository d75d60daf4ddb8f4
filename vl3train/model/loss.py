"""Cross-entropy on supervised tokens only, a chunk of logits at a time.

T tokens, H hidden size, U supervised tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

Score = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


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
    if num_chunks < 1:
        raise ValueError(f"num_loss_chunks={num_chunks}: at least 1, so that every rank calls the head")
    if positions.shape != labels.shape:
        raise ValueError(f"{tuple(positions.shape)} supervised positions for {tuple(labels.shape)} labels")
    num_supervised_tokens = positions.shape[0]
    chunk_tokens = -(-num_supervised_tokens // num_chunks)
    sums, losses, hits = [], [], []
    for chunk in range(num_chunks):
        rows = slice(chunk * chunk_tokens, (chunk + 1) * chunk_tokens)
        positions_U, labels_U = positions[rows], labels[rows]
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


def _chunk_loss(
    hidden: Tensor, lm_head: nn.Module, score: Score, positions_U: Tensor, labels_U: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    losses_U, hits_U = score(lm_head(hidden.index_select(0, positions_U)), labels_U)
    return losses_U.sum(), losses_U.detach(), hits_U


def score_logits(logits_UV: Tensor, labels_U: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in float32 (U,), and whether the label has the highest logit (U,)."""
    losses_U = F.cross_entropy(logits_UV.float(), labels_U, reduction="none")
    return losses_U, logits_UV.detach().argmax(-1) == labels_U
