"""Attention over segments laid end to end: one function, three kernels, never swapped silently.

T tokens (or patches), H query heads, Hkv key and value heads, D values a head, S segments.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("flash_attn", "torch_varlen", "reference")
"""In the order in which ``auto`` tries them."""

FLASH_MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """The kernel that serves, and why it was taken: printed when a run starts."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Bounds of the segments of one row, on the device for the kernel and on the host for everything else."""

    cu_seqlens: Tensor  # (S+1,) int32
    lengths: tuple[int, ...]  # S
    max_seqlen: int
    backend: str


def choose_attention(
    requested: str, device: torch.device, head_dims: Sequence[int], dtype: torch.dtype
) -> AttentionChoice:
    """The kernel for every head dimension in ``head_dims``; ``auto`` takes the first that can serve.

    Raises ValueError when ``requested`` is no backend, or one that cannot serve here.
    """
    if requested == "auto":
        refused: list[str] = []
        for name in BACKENDS:
            problem = _problem(name, device, head_dims, dtype)
            if problem is None:
                reason = "; ".join(refused) or "first choice"
                return AttentionChoice(name, f"auto: {reason}")
            refused.append(f"{name} {problem}")
    if requested not in BACKENDS:
        raise ValueError(f"machine.attention={requested}: it is one of auto, {', '.join(BACKENDS)}")
    if problem := _problem(requested, device, head_dims, dtype):
        raise ValueError(
            f"machine.attention={requested} cannot serve: it {problem}; "
            "machine.attention=auto takes one that can"
        )
    return AttentionChoice(requested, "asked for")


def _problem(name: str, device: torch.device, head_dims: Sequence[int], dtype: torch.dtype) -> str | None:
    """Why the backend cannot serve, or None."""
    if name == "reference":
        return None
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if wrong := [dim for dim in head_dims if dim % 8 or dim > FLASH_MAX_HEAD_DIM]:
        return f"needs head dimensions that are multiples of 8 up to {FLASH_MAX_HEAD_DIM}, not {wrong}"
    try:
        _kernel(name)
    except (ImportError, AttributeError) as error:
        return f"is not installed ({error})"
    return None


def _kernel(name: str) -> Callable[..., Any]:
    """The library function behind a backend; ImportError or AttributeError where there is none."""
    if name == "flash_attn":
        return importlib.import_module("flash_attn").flash_attn_varlen_func
    return importlib.import_module("torch.nn.attention.varlen").varlen_attn


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor,
    lengths: tuple[int, ...],
    max_seqlen: int,
    causal: bool,
    scale: float,
    backend: str,
) -> Tensor:
    """Softmax attention within each segment: ``q`` (T, H, D), ``k`` and ``v`` (T, Hkv, D) -> (T, H, D).

    ``lengths`` and ``max_seqlen`` come from the host, so nothing waits for the device. Raises ValueError
    when they do not fit the tensors: a ``max_seqlen`` below the longest segment gives NaN without a word in
    every kernel.
    """
    if sum(lengths) != q.shape[0]:
        raise ValueError(f"segment lengths sum to {sum(lengths)}, the row has {q.shape[0]} tokens")
    if max_seqlen < max(lengths):
        raise ValueError(f"max_seqlen={max_seqlen} is below the longest segment, {max(lengths)}")
    if backend == "reference":
        return _reference(q, k, v, lengths, causal, scale)
    kernel = _kernel(backend)
    if backend == "flash_attn":
        return kernel(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, softmax_scale=scale, causal=causal
        )
    # torch 2.11 has no enable_gqa: there the key and value heads are repeated.
    gqa: dict[str, bool] = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(kernel).parameters:
            gqa = {"enable_gqa": True}
        else:
            k, v = _repeat_heads(q, k), _repeat_heads(q, v)
    window = (-1, 0) if causal else (-1, -1)
    return kernel(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=window, **gqa
    )


def _reference(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], causal: bool, scale: float
) -> Tensor:
    """torch's own attention, one call for each run of neighbours of equal length (frames mostly are)."""
    k, v = _repeat_heads(q, k), _repeat_heads(q, v)
    outputs = []
    start = 0
    for length, run in groupby(lengths):
        count = len(list(run))
        rows = slice(start, start + count * length)
        start += count * length
        # (count, H, length, D)
        q_run, k_run, v_run = (x[rows].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q_run, k_run, v_run, is_causal=causal, scale=scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _repeat_heads(q: Tensor, x: Tensor) -> Tensor:
    """``x`` (T, Hkv, D) with each head repeated so that it has as many as ``q``."""
    if q.shape[1] == x.shape[1]:
        return x
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)
