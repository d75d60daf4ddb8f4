"""Attention kernels against float64: a backend serves only where out, dq, dk and dv are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from vl3train.model.attention.backends import SEQLEN_STEP, KernelChoice, choose_attention, varlen_attention

LENGTHS = ((600, 600, 600, 35, 1), (1, 1047, 130), (9, 40, 1, 14) * 65)
"""Segments of the rows checked: equal ones, one token alone, lengths that fill no tile, and many. For rows of more than
256, as clips have, flash-attn-4 compiles other kernels (BIN_BATCH_SEARCH_THRESH): before the first step, so, and not at
the first such pack."""

MAX_ERROR = 0.01
"""Relative error (norm of the difference over the norm) up to which a bfloat16 kernel is right; right ones measured
0.002 to 0.004 on an H100, a wrong dq 1.2."""


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
    dtype: torch.dtype = torch.bfloat16,
) -> KernelError:
    """Compare a backend with float64 on random rows of this shape. A kernel that raises is reported, not raised."""
    worst = dict.fromkeys(("out", "dq", "dk", "dv"), 0.0)
    failed = ""
    try:
        for lengths in LENGTHS:
            found = _errors(backend, device, dtype, lengths, (heads, kv_heads, head_dim), causal)
            # max() would pass over NaN
            worst = {
                name: value if value != value or value > worst[name] else worst[name]
                for name, value in found.items()
            }
    except (RuntimeError, ValueError, ImportError, AttributeError, NotImplementedError) as error:
        failed = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return KernelError(backend, heads, kv_heads, head_dim, causal, worst, failed)


def right_attention(
    requested: str, hf_config: Any, device: torch.device, head_dims: Sequence[int], dtype: torch.dtype
) -> KernelChoice:
    """choose_attention, and on a GPU some seconds of proof that the kernel is right for this model's heads and masks.

    ``auto`` goes on to the next backend and says why; raises ValueError with the figure where one was asked for.
    """
    wrong: dict[str, str] = {}
    while True:
        choice = choose_attention(requested, device, head_dims, dtype, wrong)
        problem = kernel_problem(choice.name, hf_config, device, dtype) if device.type == "cuda" else None
        if problem is None:
            return choice
        if requested != "auto" or choice.name == "reference":
            raise ValueError(
                f"machine.attention={choice.name} {problem}. Choose another; `vl3train kernels --check` shows all"
            )
        wrong[choice.name] = problem


def kernel_problem(backend: str, hf_config: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with a backend for the heads and masks of this model, or None."""
    vision, text = hf_config.vision_config, hf_config.text_config
    text_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    vision_heads = vision.num_attention_heads
    shapes = (
        (vision_heads, vision_heads, vision.hidden_size // vision_heads, False),
        (text.num_attention_heads, text.num_key_value_heads, text_dim, True),
    )
    for heads, kv_heads, head_dim, causal in shapes:
        found = check_kernel(
            backend, device, heads=heads, kv_heads=kv_heads, head_dim=head_dim, causal=causal, dtype=dtype
        )
        if not found.is_right:
            figures = ", ".join(f"{name} {error:.2g}" for name, error in found.errors.items())
            return (
                f"is wrong on this machine for heads of {head_dim} "
                f"({found.failed or 'relative errors against float64: ' + figures})"
            )
    return None


def _errors(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    lengths: tuple[int, ...],
    shape: tuple[int, int, int],
    causal: bool,
) -> dict[str, float]:
    heads, kv_heads, dim = shape
    generator = torch.Generator(device).manual_seed(0)

    def draw(num_heads: int) -> Tensor:
        rows = torch.randn(sum(lengths), num_heads, dim, device=device, generator=generator)
        return rows.to(dtype).requires_grad_()

    q, k, v = draw(heads), draw(kv_heads), draw(kv_heads)
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    out = varlen_attention(
        q,
        k,
        v,
        cu_seqlens=bounds,
        lengths=lengths,
        max_seqlen=-(-max(lengths) // SEQLEN_STEP) * SEQLEN_STEP,
        causal=causal,
        scale=dim**-0.5,
        backend=backend,
    )
    exact = exact_attention(q, k, v, lengths, causal=causal, scale=dim**-0.5)
    upstream = torch.randn(out.shape, device=device, generator=generator).to(dtype)
    ours = (out, *torch.autograd.grad(out, (q, k, v), upstream))
    right = (exact, *torch.autograd.grad(exact, (q, k, v), upstream.double()))
    return {
        name: float(((a.double() - b.double()).norm() / b.double().norm()).detach())
        for name, a, b in zip(("out", "dq", "dk", "dv"), ours, right, strict=True)
    }


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], *, causal: bool, scale: float
) -> Tensor:
    """Softmax attention in float64, one segment after the other, by its definition: (T, H, D)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    outputs = []
    for q_s, k_s, v_s in zip(*(x.double().split(lengths) for x in (q, k, v)), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q_s, k_s) * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_s))
    return torch.cat(outputs)
