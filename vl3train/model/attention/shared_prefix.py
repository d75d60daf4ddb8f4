"""Attention of branches on the prefix they share: two calls of a kernel, joined by their log-sum-exp.

A branch sees its own tokens up to each one, and the whole prefix. One call attends within each segment, one from the
branches to the prefixes. With l the log-sum-exp of a row over all it sees, l = log(exp(l1) + exp(l2)), and its output
is exp(l1 - l) o1 + exp(l2 - l) o2. The gradients of both parts follow from the joint output o and the joint l, as the
shares p = exp(scores - l) of the softmax and the row sums of d_o * o are those of the whole row. So each call of the
kernel's backward pass gets the joint ones.

T tokens, R of them in branches, Q in prefixes, F families, H query heads, Hkv key and value heads, D values a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Bounds = tuple[Tensor, Tensor]
"""Segment bounds (S+1,) int32 of the queries and of the keys."""
Heads = tuple[Tensor, Tensor, Tensor]
"""Queries (T, H, D), keys and values (T, Hkv, D)."""


SCORES_AT_A_TIME = 1 << 22
"""Of a head, by the reference: pieces of many segments fit a cache, and one long segment is a piece of its own."""


class SharedPrefixes(NamedTuple):
    """Which rows are prefixes and which are branches of them, family after family. All families have both."""

    prefix_rows: Tensor  # (Q,) int64
    branch_rows: Tensor  # (R,) int64
    prefix_bounds: Tensor  # (F+1,) int32 into prefix_rows
    branch_bounds: Tensor  # (F+1,) int32 into branch_rows: all branches of a family are one piece


class Kernel(Protocol):
    """A variable-length attention kernel; queries and keys may have other lengths."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, longest: int, causal: bool, scale: float
    ) -> Any:
        """(T, H, D), and the log-sum-exp of each row (H, T) float32."""

    def attend_backward(
        self,
        d_out: Tensor,
        qkv: Heads,
        outputs: tuple[Tensor, Tensor],
        bounds: Bounds,
        longest: int,
        causal: bool,
        scale: float,
        d_qkv: Heads,
    ) -> None:
        """Write the gradients into ``d_qkv``; ``outputs`` are those of ``attend``."""


def attend_shared(
    kernel: Kernel, qkv: Heads, layout: Sequence[Tensor], longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention within each segment, and of branches on their prefix: (T, H, D), log-sum-exp (H, T).

    Args:
        kernel: what attends.
        qkv: queries, keys and values; may be views.
        layout: (S+1,) int32, bounds of the segments: prefixes, branches and samples that share nothing; then the
            tensors of a ``SharedPrefixes``.
        longest: at least the tokens of each segment, and of the branches of each family.
        scale: of the scores.
    """
    q, k, v = qkv
    cu_seqlens, prefix_rows, branch_rows, prefix_bounds, branch_bounds = layout
    out, log_sum_exp = kernel.attend(q, k, v, (cu_seqlens, cu_seqlens), longest, True, scale)
    on_prefix, its_lse = kernel.attend(
        q[branch_rows], k[prefix_rows], v[prefix_rows], (branch_bounds, prefix_bounds), longest, False, scale
    )
    within, own_lse = out[branch_rows], log_sum_exp[:, branch_rows]
    joint = torch.logaddexp(own_lse, its_lse)
    own_share, its_share = ((lse - joint).exp().t()[:, :, None] for lse in (own_lse, its_lse))
    out[branch_rows] = (within * own_share + on_prefix * its_share).to(out.dtype)
    log_sum_exp[:, branch_rows] = joint
    return out, log_sum_exp


def attend_shared_backward(
    kernel: Kernel,
    d_out: Tensor,
    qkv: Heads,
    outputs: tuple[Tensor, Tensor],
    layout: Sequence[Tensor],
    longest: int,
    scale: float,
    d_qkv: Heads,
) -> None:
    """Write the gradients of queries, keys and values into ``d_qkv``; ``outputs`` are those of ``attend_shared``."""
    cu_seqlens, prefix_rows, branch_rows, prefix_bounds, branch_bounds = layout
    bounds = cu_seqlens, cu_seqlens
    kernel.attend_backward(d_out, qkv, outputs, bounds, longest, True, scale, d_qkv)
    (q, k, v), (out, log_sum_exp) = qkv, outputs
    part = q[branch_rows], k[prefix_rows], v[prefix_rows]
    d_part = torch.empty_like(part[0]), torch.empty_like(part[1]), torch.empty_like(part[2])
    joint = out[branch_rows], log_sum_exp[:, branch_rows].contiguous()
    bounds = branch_bounds, prefix_bounds
    kernel.attend_backward(d_out[branch_rows], part, joint, bounds, longest, False, scale, d_part)
    for d, rows, more in zip(d_qkv, (branch_rows, prefix_rows, prefix_rows), d_part, strict=True):
        d[rows] += more


class PlainKernel:
    """The reference: softmax attention in float32 or more, by its definition; segments of one length together."""

    @staticmethod
    def attend(
        q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, longest: int, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See ``Kernel``."""
        out, sums = torch.empty_like(q), q.new_empty(q.shape[1::-1], dtype=torch.float32)
        for of_q, of_k in _alike(bounds):
            q_s, k_s, v_s = _heads(q[of_q], k[of_k], v[of_k])
            scores = _scores(q_s, k_s, causal, scale)
            out[of_q] = torch.einsum("shqk,skhd->sqhd", scores.softmax(-1), v_s).to(out.dtype)
            sums[:, of_q] = scores.logsumexp(-1).transpose(0, 1).float()
        return out, sums

    @staticmethod
    def attend_backward(
        d_out: Tensor,
        qkv: Heads,
        outputs: tuple[Tensor, Tensor],
        bounds: Bounds,
        longest: int,
        causal: bool,
        scale: float,
        d_qkv: Heads,
    ) -> None:
        """See ``Kernel``."""
        q, k, v = qkv
        out, log_sum_exp = outputs
        d_q, d_k, d_v = d_qkv
        for of_q, of_k in _alike(bounds):
            q_s, k_s, v_s = _heads(q[of_q], k[of_k], v[of_k])
            d_s, out_s = d_out[of_q].to(q_s.dtype), out[of_q].to(q_s.dtype)
            lse = log_sum_exp[:, of_q].transpose(0, 1)[..., None]
            shares = (_scores(q_s, k_s, causal, scale) - lse).exp()
            d_shares = (
                torch.einsum("sqhd,skhd->shqk", d_s, v_s) - (d_s * out_s).sum(-1).transpose(1, 2)[..., None]
            )
            d_scores = shares * d_shares * scale
            d_q[of_q] = torch.einsum("shqk,skhd->sqhd", d_scores, k_s).to(d_q.dtype)
            of_heads = (
                torch.einsum("shqk,sqhd->skhd", d_scores, q_s),
                torch.einsum("shqk,sqhd->skhd", shares, d_s),
            )
            for d, more in zip((d_k, d_v), of_heads, strict=True):
                d[of_k] = more.unflatten(2, (k.shape[1], -1)).sum(3).to(d.dtype)


def _alike(bounds: Bounds) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of the queries (n, tokens of each) and of the keys, of n segments with as many; every segment once."""
    starts = [one[:-1].tolist() for one in bounds]
    alike: dict[tuple[int, int], list[int]] = {}
    for segment, lengths in enumerate(zip(*(one.diff().tolist() for one in bounds), strict=True)):
        alike.setdefault(lengths, []).append(segment)
    for lengths, segments in alike.items():
        most = max(1, SCORES_AT_A_TIME // max(1, lengths[0] * lengths[1]))
        for first in range(0, len(segments), most):
            of_q, of_k = (
                torch.tensor([own[one] for one in segments[first : first + most]], device=bounds[0].device)[
                    :, None
                ]
                + torch.arange(length, device=bounds[0].device)
                for own, length in zip(starts, lengths, strict=True)
            )
            yield of_q, of_k


def _heads(q: Tensor, k: Tensor, v: Tensor) -> Heads:
    """The same in float32 or more, the heads of keys and values repeated: all (n, tokens, H, D)."""
    q, k, v = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    return q, k, v


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    scores = torch.einsum("sqhd,skhd->shqk", q, k) * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -torch.inf)
    return scores
