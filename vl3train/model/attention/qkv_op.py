"""Attention on rows that hold queries, keys and values side by side, as one matrix product writes them.

So nothing is copied between that product and the attention kernel, forward or backward. T tokens (or patches), H query
heads, Hkv key and value heads, D values a head; a row holds (H + 2 Hkv) D values.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vl3train.model.attention.shared_prefix import (
    Kernel,
    PlainKernel,
    attend_shared,
    attend_shared_backward,
)

SERVED = ("flash_attn_4", "reference")
"""The backends of model/attention/backends.py that have this op."""


@torch.library.custom_op("vl3train::qkv_attention", mutates_args=())
def qkv_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    shared: Sequence[Tensor],
    head_dim: int,
    num_heads: int,
    max_seqlen: int,
    backend: str,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention within each segment: (T, H D), and the log-sum-exp of each row (H, T) float32.

    ``shared``: the tensors of a ``SharedPrefixes``, or none. Where nothing is shared, the reference needs no
    log-sum-exp: it is empty.
    """
    q, k, v = heads_of(qkv, head_dim, num_heads)
    if shared:
        assert causal, "only the language model shares prefixes"
        kernel = _kernel(backend)
        out, log_sum_exp = attend_shared(kernel, (q, k, v), (cu_seqlens, *shared), max_seqlen, scale)
        return out.flatten(1), log_sum_exp
    if backend == "flash_attn_4":
        kernel = _kernel(backend)
        out, log_sum_exp = kernel.attend(q, k, v, (cu_seqlens, cu_seqlens), max_seqlen, causal, scale)
        return out.flatten(1), log_sum_exp
    lengths = tuple(cu_seqlens.diff().tolist())
    return reference(q, k, v, lengths, causal, scale).flatten(1), qkv.new_empty(0, dtype=torch.float32)


def _kernel(backend: str) -> Kernel:
    if backend == "reference":
        return PlainKernel
    from vl3train.model.attention import flash_attn_4

    return flash_attn_4


@qkv_attention.register_fake
def _(
    qkv: Tensor,
    cu_seqlens: Tensor,
    shared: Sequence[Tensor],
    head_dim: int,
    num_heads: int,
    max_seqlen: int,
    backend: str,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    log_sum_exp = (num_heads, qkv.shape[0]) if shared or backend == "flash_attn_4" else (0,)
    return qkv.new_empty((qkv.shape[0], num_heads * head_dim)), qkv.new_empty(
        log_sum_exp, dtype=torch.float32
    )


@torch.library.custom_op("vl3train::qkv_attention_backward", mutates_args=())
def qkv_attention_backward(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    cu_seqlens: Tensor,
    shared: Sequence[Tensor],
    head_dim: int,
    num_heads: int,
    max_seqlen: int,
    backend: str,
    causal: bool,
    scale: float,
) -> Tensor:
    """The gradient of ``qkv``: the kernel writes those of queries, keys and values into their places in each row."""
    if shared or backend == "flash_attn_4":
        kernel, d_qkv = _kernel(backend), torch.empty_like(qkv)
        parts, d_parts = heads_of(qkv, head_dim, num_heads), heads_of(d_qkv, head_dim, num_heads)
        d_out, out = (rows.contiguous().unflatten(1, (num_heads, head_dim)) for rows in (d_out, out))
        outputs = out, log_sum_exp
        if shared:
            attend_shared_backward(
                kernel, d_out, parts, outputs, (cu_seqlens, *shared), max_seqlen, scale, d_parts
            )
        else:
            bounds = cu_seqlens, cu_seqlens
            kernel.attend_backward(d_out, parts, outputs, bounds, max_seqlen, causal, scale, d_parts)
        return d_qkv
    return _reference_backward(d_out, qkv, out, cu_seqlens, head_dim, num_heads, causal, scale)


def _reference_backward(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    cu_seqlens: Tensor,
    head_dim: int,
    num_heads: int,
    causal: bool,
    scale: float,
) -> Tensor:
    """By the formulas, one segment after the other: ops run below autograd, so autograd cannot do it."""
    q, k, v = (x.float() for x in heads_of(qkv, head_dim, num_heads))
    kv_heads = k.shape[1]
    k, v = (x.repeat_interleave(num_heads // kv_heads, dim=1) for x in (k, v))
    d_out, out = (x.float().unflatten(1, (num_heads, head_dim)) for x in (d_out, out))
    parts = []
    for q_s, k_s, v_s, out_s, d_s in zip(
        *(x.split(cu_seqlens.diff().tolist()) for x in (q, k, v, out, d_out)), strict=True
    ):
        scores = torch.einsum("qhd,khd->hqk", q_s, k_s) * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf)
        shares = scores.softmax(-1)
        d_shares = torch.einsum("qhd,khd->hqk", d_s, v_s) - (d_s * out_s).sum(-1).t()[:, :, None]
        d_scores = shares * d_shares * scale
        d_q = torch.einsum("hqk,khd->qhd", d_scores, k_s)
        d_k = torch.einsum("hqk,qhd->khd", d_scores, q_s)
        d_v = torch.einsum("hqk,qhd->khd", shares, d_s)
        d_k, d_v = (x.unflatten(1, (kv_heads, -1)).sum(2) for x in (d_k, d_v))
        parts.append(torch.cat((d_q, d_k, d_v), 1).flatten(1))
    return torch.cat(parts).to(qkv.dtype)


@qkv_attention_backward.register_fake
def _(d_out: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cu_seqlens, shared, *ctx.settings = inputs
    ctx.save_for_backward(qkv, *output, cu_seqlens, *shared)


def _backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | list[None] | None, ...]:
    qkv, out, log_sum_exp, cu_seqlens, *shared = ctx.saved_tensors
    d_qkv = qkv_attention_backward(d_out, qkv, out, log_sum_exp, cu_seqlens, shared, *ctx.settings)
    return d_qkv, None, [None] * len(shared), *(None,) * 6


qkv_attention.register_autograd(_backward, setup_context=_keep_for_backward)


def heads_of(rows: Tensor, head_dim: int, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (T, H, D), keys and values (T, Hkv, D) as views of (T, (H + 2 Hkv) D) rows."""
    heads = rows.view(len(rows), -1, head_dim)
    kv_heads = (heads.shape[1] - num_heads) // 2
    q, k, v = heads.split((num_heads, kv_heads, kv_heads), 1)
    return q, k, v


def reference(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], causal: bool, scale: float
) -> Tensor:
    """torch's own attention, one call for each run of neighbouring segments of equal length, as frames mostly are."""
    k, v = repeat_heads(q, k), repeat_heads(q, v)
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    # Split, not sliced: the gradient of each slice would be as long as the whole row.
    parts = (x.split([length * count for length, count in runs]) for x in (q, k, v))
    outputs = []
    for (length, count), *qkv in zip(runs, *parts, strict=True):
        # (count, H, length, D)
        q_run, k_run, v_run = (x.unflatten(0, (count, length)).transpose(1, 2) for x in qkv)
        out = F.scaled_dot_product_attention(q_run, k_run, v_run, is_causal=causal, scale=scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def repeat_heads(q: Tensor, x: Tensor) -> Tensor:
    """``x`` (T, Hkv, D) with each head repeated so that it has as many as ``q``."""
    if q.shape[1] == x.shape[1]:
        return x
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)
