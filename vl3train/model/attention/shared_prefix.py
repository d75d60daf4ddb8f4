"""Attention of branches on the prefix they share: two calls of a kernel, joined by their log-sum-exp.

A branch sees its own tokens up to each one, and the whole prefix. One call attends within each segment, one from the
branches to the prefixes. With l the log-sum-exp of a row over all it sees, l = log(exp(l1) + exp(l2)), and its output
is exp(l1 - l) o1 + exp(l2 - l) o2. The gradients of both parts follow from the joint output o and the joint l, as the
shares p = exp(scores - l) of the softmax and the row sums of d_o * o are those of the whole row. So each call of the
kernel's backward pass gets the joint ones.

T tokens, R of them in branches, Q in prefixes, F families, H query heads, Hkv key and value heads, D values a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Bounds = tuple[Tensor, Tensor]
"""Segment bounds (S+1,) int32 of the queries and of the keys."""
Heads = tuple[Tensor, Tensor, Tensor]
"""Queries (T, H, D), keys and values (T, Hkv, D)."""


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
    """The reference: softmax attention in float32 or more, one segment after the other, by its definition."""

    @staticmethod
    def attend(
        q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, longest: int, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See ``Kernel``."""
        outputs, sums = [], []
        for q_s, k_s, v_s in _segments(q, k, v, bounds):
            scores = _scores(q_s, k_s, causal, scale)
            outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_s))
            sums.append(scores.logsumexp(-1))
        return torch.cat(outputs).to(q.dtype), torch.cat(sums, 1).float()

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
        lengths = bounds[0].diff().tolist()
        rows = zip(d_out.split(lengths), out.split(lengths), log_sum_exp.split(lengths, 1), strict=True)
        grads = []
        for (q_s, k_s, v_s), (d_s, out_s, lse_s) in zip(_segments(q, k, v, bounds), rows, strict=True):
            d_s, out_s = d_s.to(q_s.dtype), out_s.to(q_s.dtype)
            shares = (_scores(q_s, k_s, causal, scale) - lse_s[:, :, None]).exp()
            d_shares = torch.einsum("qhd,khd->hqk", d_s, v_s) - (d_s * out_s).sum(-1).t()[:, :, None]
            d_scores = shares * d_shares * scale
            d_k = torch.einsum("hqk,qhd->khd", d_scores, q_s)
            d_v = torch.einsum("hqk,qhd->khd", shares, d_s)
            of_heads = (d.unflatten(1, (k.shape[1], -1)).sum(2) for d in (d_k, d_v))
            grads.append((torch.einsum("hqk,khd->qhd", d_scores, k_s), *of_heads))
        for d, parts in zip(d_qkv, zip(*grads, strict=True), strict=True):
            d.copy_(torch.cat(parts))


def _segments(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds) -> list[Heads]:
    """Queries, keys and values of each segment, the heads of keys repeated, in float32 or more."""
    q, k, v = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    of_q, of_k = (one.diff().tolist() for one in bounds)
    return list(zip(q.split(of_q), k.split(of_k), v.split(of_k), strict=True))


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf)
    return scores
