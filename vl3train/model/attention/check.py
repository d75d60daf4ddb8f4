"""Compares attention kernels with float64: a backend serves only where out, dq, dk and dv are right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from vl3train.contracts.families import family_lengths, family_rows
from vl3train.contracts.kept import forget, keep, read_kept
from vl3train.contracts.shapes import TowerShape, tower_shapes
from vl3train.model.attention.backends import (
    BACKENDS,
    SEQLEN_STEP,
    KernelChoice,
    Segments,
    choose_attention,
    varlen_attention,
)
from vl3train.model.attention.qkv_op import SERVED
from vl3train.model.machine_key import machine_key

LENGTHS = ((600, 600, 600, 35, 1), (1, 1047, 130), (9, 40, 1, 14) * 65)
"""Segments of the rows that are checked: equal lengths, one token alone, lengths that fill no tile, and many segments.
For more than 256 segments, as clips have, flash-attn-4 compiles other kernels (BIN_BATCH_SEARCH_THRESH). The check
compiles them before the first step, so the first such pack does not wait."""

FAMILIES = (
    ((600, 35, 1, 130, 600, 9), (3, 0, 0, 0, 0, 0)),
    ((1, 7, 1047, 40, 130, 3, 300), (1, 0, 3, 0, 0, 0, 0)),
)
"""Segments of rows with shared prefixes, and how many branches follow each of them."""

CANNOT_SHARE = "cannot share the prefix of records with the same media"

MAX_ERROR = 0.01
"""A bfloat16 kernel is right below this relative error (norm of the difference over the norm). Right kernels had 0.002
to 0.004 on an H100; a wrong dq had 1.2."""


ERRORS = ("out", "dq", "dk", "dv")


@dataclass(frozen=True, slots=True)
class KernelError:
    """Largest relative errors of one backend for one shape; ``failed`` says why there are none."""

    backend: str
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    errors: dict[str, float]
    failed: str = ""

    @property
    def is_right(self) -> bool:
        """Whether every error is below the limit; NaN is not."""
        return not self.failed and all(error < MAX_ERROR for error in self.errors.values())


def check_kernel(
    backend: str,
    device: torch.device,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    causal: bool,
    shares_prefix: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> KernelError:
    """Compare a backend with float64 on random rows of this shape. A kernel that raises is reported, not raised.

    With ``shares_prefix``, which needs ``causal``, rows of families too.
    """
    worst = dict.fromkeys(ERRORS, 0.0)
    failed = ""
    try:
        rows = [(lengths, (0,) * len(lengths)) for lengths in LENGTHS]
        for lengths, num_branches in [*rows, *(FAMILIES if shares_prefix else ())]:
            shape = heads, kv_heads, head_dim
            found = _errors(backend, device, dtype, (lengths, num_branches), shape, causal)
            worst = {name: largest([worst[name], value]) for name, value in found.items()}
    except (RuntimeError, ValueError, ImportError, AttributeError, NotImplementedError) as error:
        failed = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return KernelError(backend, heads, kv_heads, head_dim, causal, worst, failed)


def proven_kernel(
    backend: str,
    device: torch.device,
    shape: TowerShape,
    dtype: torch.dtype,
    *,
    shares_prefix: bool,
    anew: bool = False,
) -> KernelError:
    """``check_kernel`` for a tower, or what it found on this machine before, where the kernel was right.

    A wrong kernel is not remembered: its errors may have had another cause. With ``anew`` nothing is taken from before.
    """
    shares = shares_prefix and shape.is_decoder
    of: dict[str, Any] = {
        "heads": shape.num_heads,
        "kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "causal": shape.is_decoder,
    }
    key = {"attention": backend, **of, "shares_prefix": shares, "dtype": str(dtype), **machine_key(device)}
    if not anew:
        before = KernelError(backend, **of, errors=errors_in(read_kept(key), ERRORS))
        if before.is_right:
            return before
    found = check_kernel(backend, device, **of, shares_prefix=shares, dtype=dtype)
    if found.is_right:
        keep(key, found.errors)
    else:
        forget(key)
    return found


def errors_in(value: Any, names: Sequence[str]) -> dict[str, float]:
    """Errors as they were kept, NaN for each that is not there."""
    found = value if isinstance(value, dict) else {}
    return {name: error if isinstance(error := found.get(name), float) else math.nan for name in names}


def right_attention(
    requested: str,
    hf_config: Any,
    device: torch.device,
    head_dims: Sequence[int],
    dtype: torch.dtype,
    *,
    shares_prefix: bool = False,
) -> KernelChoice:
    """``choose_attention``, and on a GPU a check that the kernel is right for this model's heads and masks.

    With ``shares_prefix`` it must serve branches too. The check takes some seconds, once on a machine. Where a kernel
    is wrong, ``auto`` tries the next backend and says why. Raises ValueError, with the error measured, where a wrong
    one was asked for.
    """
    wrong: dict[str, str] = dict.fromkeys(set(BACKENDS) - set(SERVED), CANNOT_SHARE) if shares_prefix else {}
    if requested in wrong:
        raise ValueError(
            f"machine.attention={requested} {CANNOT_SHARE}; take auto, or data.share_prefix=false"
        )
    while True:
        choice = choose_attention(requested, device, head_dims, dtype, wrong)
        if shares_prefix and requested == "auto" and choice.name == "reference" and device.type == "cuda":
            raise ValueError(
                f"data.share_prefix=true: no fast attention kernel serves it here ({choice.reason}); "
                "set data.share_prefix=false"
            )
        problem = None
        if device.type == "cuda":
            problem = kernel_problem(choice.name, hf_config, device, dtype, shares_prefix=shares_prefix)
        if problem is None:
            return choice
        if requested != "auto" or choice.name == "reference":
            raise ValueError(
                f"machine.attention={choice.name} {problem}. Choose another: `vl3train kernels --check` compares all"
            )
        wrong[choice.name] = problem


def kernel_problem(
    backend: str, hf_config: Any, device: torch.device, dtype: torch.dtype, *, shares_prefix: bool = False
) -> str | None:
    """What is wrong with a backend for the heads and masks of this model, or None."""
    for shape in tower_shapes(hf_config):
        found = proven_kernel(backend, device, shape, dtype, shares_prefix=shares_prefix)
        if not found.is_right:
            figures = ", ".join(f"{name} {error:.2g}" for name, error in found.errors.items())
            return (
                f"is wrong on this machine for head dimension {shape.head_dim} "
                f"({found.failed or 'relative errors against float64: ' + figures})"
            )
    return None


def _errors(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    row: tuple[tuple[int, ...], tuple[int, ...]],
    shape: tuple[int, int, int],
    causal: bool,
) -> dict[str, float]:
    (lengths, num_branches), (heads, kv_heads, dim) = row, shape
    generator = torch.Generator(device).manual_seed(0)

    def draw(num_heads: int) -> Tensor:
        rows = torch.randn(sum(lengths), num_heads, dim, device=device, generator=generator)
        return rows.to(dtype).requires_grad_()

    q, k, v = draw(heads), draw(kv_heads), draw(kv_heads)
    segments = segments_of(lengths, num_branches, backend, device)
    out = varlen_attention(q, k, v, segments, causal=causal, scale=dim**-0.5)
    exact = exact_attention(q, k, v, lengths, num_branches, causal=causal, scale=dim**-0.5)
    upstream = torch.randn(out.shape, device=device, generator=generator).to(dtype)
    ours = (out, *torch.autograd.grad(out, (q, k, v), upstream))
    right = (exact, *torch.autograd.grad(exact, (q, k, v), upstream.double()))
    return {
        name: float(((a.double() - b.double()).norm() / b.double().norm()).detach())
        for name, a, b in zip(ERRORS, ours, right, strict=True)
    }


def segments_of(
    lengths: tuple[int, ...], num_branches: tuple[int, ...], backend: str, device: torch.device
) -> Segments:
    """The segments of a row; ``num_branches`` as in contracts/families.py."""
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    rows = [torch.from_numpy(array).to(device) for array in family_rows(lengths, num_branches)]
    shared = (rows[0], rows[1], rows[2].int(), rows[3].int()) if any(num_branches) else ()
    longest = max((*lengths, *(branches for _, branches in family_lengths(lengths, num_branches))))
    return Segments(bounds, lengths, -(-longest // SEQLEN_STEP) * SEQLEN_STEP, backend, shared)


def largest(errors: Sequence[float]) -> float:
    """The largest, or NaN where one is NaN: max() would pass over it."""
    return next((error for error in errors if error != error), max(errors))


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    num_branches: tuple[int, ...] = (),
    *,
    causal: bool,
    scale: float,
) -> Tensor:
    """Softmax attention in float64, one segment after the other, by its definition: (T, H, D).

    A branch comes behind the keys and values of its prefix; ``num_branches`` as in contracts/families.py.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    outputs, prefix, left = [], (k[:0].double(), v[:0].double()), 0
    segments = zip(*(x.double().split(lengths) for x in (q, k, v)), strict=True)
    for (q_s, k_s, v_s), count in zip(segments, num_branches or (0,) * len(lengths), strict=True):
        if count:
            prefix, left = (k_s, v_s), count
        elif left:
            k_s, v_s, left = torch.cat((prefix[0], k_s)), torch.cat((prefix[1], v_s)), left - 1
        scores = torch.einsum("qhd,khd->hqk", q_s, k_s) * scale
        if causal:
            later = torch.ones_like(scores[0]).triu(1 + len(k_s) - len(q_s)).bool()
            scores = scores.masked_fill(later, -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_s))
    return torch.cat(outputs)
