"""Attention over segments laid end to end: one function, four kernels. A choice is never changed silently.

T tokens (or patches), H query heads, Hkv key and value heads, D values a head, S segments.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vl3train.model.attention.qkv_op import SERVED, qkv_attention, reference, repeat_heads

BACKENDS = ("flash_attn_4", "flash_attn", "torch_varlen", "reference")
"""In the order in which ``auto`` tries them."""

MAX_HEAD_DIM = {"flash_attn_4": 128, "flash_attn": 256, "torch_varlen": 256}

TORCH_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])

SEQLEN_STEP = 512
"""Kernels get max_seqlen rounded up to a multiple of this, so that only few values occur."""


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """The kernel that serves, and why it was chosen: printed when a run starts."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Bounds of the segments of one row, on the device for the kernel and on the host for everything else."""

    cu_seqlens: Tensor  # (S+1,) int32
    lengths: tuple[int, ...]  # S; only the reference reads them, where layers are not compiled; else empty
    max_seqlen: int  # at least the longest segment, and the branches of each family together
    backend: str
    shared: tuple[Tensor, ...] = ()
    """A ``SharedPrefixes``; empty where no segment is a branch."""


def make_segments(
    cu_seqlens: Tensor,
    lengths: tuple[int, ...],
    num_rows: int,
    backend: str,
    *,
    compiled: bool,
    shared: tuple[Tensor, ...] = (),
    branches: Sequence[int] = (),
) -> Segments:
    """Bounds for a row of ``num_rows`` tokens or patches, with the prefixes it shares, and their branches' tokens.

    Compiled layers are compiled again for each value of a plain argument. So the longest length is rounded up, and the
    lengths, which kernels do not read, are left out. Raises ValueError when the lengths do not add up to the row.
    """
    if sum(lengths) != num_rows:
        raise ValueError(f"segment lengths sum to {sum(lengths)}, the row has {num_rows} tokens")
    longest = max((*lengths, *branches))
    if backend == "reference" and not compiled:
        return Segments(cu_seqlens, lengths, longest, backend, shared)
    return Segments(cu_seqlens, (), -(-longest // SEQLEN_STEP) * SEQLEN_STEP, backend, shared)


def choose_attention(
    requested: str,
    device: torch.device,
    head_dims: Sequence[int],
    dtype: torch.dtype,
    wrong: Mapping[str, str] | None = None,
) -> KernelChoice:
    """The kernel for every head dimension in ``head_dims``; ``auto`` takes the first that can serve.

    ``wrong`` names backends that ``auto`` must not take, with the reason (model/attention/check.py finds them).
    Raises ValueError when ``requested`` is no backend, or one that cannot serve here.
    """
    if requested == "auto":
        rejected: list[str] = []
        for name in BACKENDS:
            problem = (wrong or {}).get(name) or _problem(name, device, head_dims, dtype)
            if problem is None:
                reason = "; ".join(rejected) or "first choice"
                return KernelChoice(name, f"auto: {reason}")
            rejected.append(f"{name} {problem}")
    if requested not in BACKENDS:
        raise ValueError(f"machine.attention={requested}: it is one of auto, {', '.join(BACKENDS)}")
    if problem := _problem(requested, device, head_dims, dtype):
        raise ValueError(
            f"machine.attention={requested} cannot serve: it {problem}; "
            "machine.attention=auto takes one that can"
        )
    return KernelChoice(requested, "asked for")


def _problem(name: str, device: torch.device, head_dims: Sequence[int], dtype: torch.dtype) -> str | None:
    """Why the backend cannot serve, or None."""
    if name == "reference":
        return None
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if wrong := [dim for dim in head_dims if dim % 8 or dim > MAX_HEAD_DIM[name]]:
        return f"needs head dimensions that are multiples of 8 up to {MAX_HEAD_DIM[name]}, not {wrong}"
    if (
        name == "flash_attn_4"
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability(device)[0] < 9
    ):
        return "needs a GPU of the Hopper generation or later"
    try:
        _kernel(name)
    except (ImportError, AttributeError) as error:
        return f"is not installed ({error})"
    except (
        RuntimeError
    ) as error:  # nvidia-cutlass-dsl, which flash-attn-4 needs, raises it where a part is missing
        return f"is not wholly installed ({error})"
    return None


_LOADED: dict[str, Callable[..., Any]] = {}


def _kernel(name: str) -> Callable[..., Any]:
    """The library function behind a backend; ImportError or AttributeError where there is none."""
    if name not in _LOADED:
        module, function = {
            "flash_attn_4": ("vl3train.model.attention.flash_attn_4", "attend"),
            "flash_attn": ("flash_attn", "flash_attn_varlen_func"),
            "torch_varlen": ("torch.nn.attention.varlen", "varlen_attn"),
        }[name]
        _LOADED[name] = getattr(importlib.import_module(module), function)
    return _LOADED[name]


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    causal: bool,
    scale: float,
) -> Tensor:
    """Softmax attention within each segment: ``q`` (T, H, D), ``k`` and ``v`` (T, Hkv, D) -> (T, H, D).

    ``segments`` must have their lengths. Raises ValueError when these do not fit the tensors: with a ``max_seqlen``
    below the longest segment every kernel gives NaN and no error.
    """
    lengths, max_seqlen = segments.lengths, segments.max_seqlen
    if sum(lengths) != q.shape[0]:
        raise ValueError(f"segment lengths sum to {sum(lengths)}, the row has {q.shape[0]} tokens")
    if max_seqlen < max(lengths):
        raise ValueError(f"max_seqlen={max_seqlen} is below the longest segment, {max(lengths)}")
    return attend(q, k, v, segments, causal=causal, scale=scale)


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, causal: bool, scale: float) -> Tensor:
    """``varlen_attention`` without its checks, for layers that torch.compile traces: see make_segments."""
    cu_seqlens, max_seqlen = segments.cu_seqlens, segments.max_seqlen
    if segments.backend == "reference" and not segments.shared and not torch.compiler.is_compiling():
        return reference(q, k, v, segments.lengths, causal, scale)
    if segments.backend in SERVED:
        # The reference too, as an op: if torch.compile traced it, it would read each pack's lengths and compile again.
        rows, (num_heads, head_dim) = torch.cat((q, k, v), 1).flatten(1), q.shape[1:]
        settings = head_dim, num_heads, max_seqlen, segments.backend, causal, scale
        out, _ = qkv_attention(rows, cu_seqlens, segments.shared, *settings)
        return out.unflatten(1, (num_heads, head_dim))
    assert not segments.shared, f"{segments.backend} would attend to no prefix: right_attention refuses it"
    kernel = _kernel(segments.backend)
    if segments.backend == "flash_attn":
        return kernel(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, softmax_scale=scale, causal=causal
        )
    # torch 2.11 has no enable_gqa: repeat the key and value heads instead.
    gqa: dict[str, bool] = {}
    if q.shape[1] != k.shape[1]:
        if TORCH_VERSION >= (2, 13):
            gqa = {"enable_gqa": True}
        else:
            k, v = repeat_heads(q, k), repeat_heads(q, v)
    window = (-1, 0) if causal else (-1, -1)
    return kernel(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=window, **gqa
    )
