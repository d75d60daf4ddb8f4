"""flash-attn-4, forward and backward; model/attention/qkv_op.py makes an op of it. Importing this needs the library.

T tokens (or patches), H query heads, Hkv key and value heads, D values a head.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from vl3train.model.attention.flash_attn_4_cache import keep_kernels

keep_kernels(__file__)  # before the library is imported, which reads once where they are kept

from flash_attn.cute import interface  # noqa: E402
from flash_attn.cute.flash_bwd_sm90 import FlashAttentionBackwardSm90  # noqa: E402


def mend(kernel: Any) -> None:
    """Let the kernels of the backward pass on Hopper agree on the width of a row of dq.

    In 4.0.0b36 the main one rounds heads up to a multiple of 16, those before and after it to 32: for heads of 72 and
    80 dq comes out wrong (relative error 1.2), without a word. Here the main one rounds to 32 as well, as in
    https://github.com/Dao-AILab/flash-attention/pull/2896. (With 16 everywhere it is no faster, and its dq and dk
    were wrong now and then.) That it helps is not believed but measured whenever a run starts
    (model/attention/check.py).
    """
    init = kernel.__init__

    @functools.wraps(init)
    def mended(
        self: Any, dtype: Any, head_dim: int, head_dim_v: int | None = None, *args: Any, **kwargs: Any
    ) -> None:
        init(self, dtype, head_dim, head_dim_v, *args, **kwargs)
        if self.dKV_swapAB:  # rounds to 64, and so do the others
            return
        head_dim_v = head_dim_v or head_dim
        self.tile_hdim, self.tile_hdimv = -(-head_dim // 32) * 32, -(-head_dim_v // 32) * 32
        self.check_hdim_oob = head_dim != self.tile_hdim
        self.check_hdim_v_oob = head_dim_v != self.tile_hdimv

    kernel.__init__ = mended


mend(FlashAttentionBackwardSm90)


def attend(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention within each segment: (T, H, D), and the log-sum-exp of each row (H, T) float32.

    ``q``, ``k`` and ``v`` may be views, as long as the values of a head lie side by side.
    """
    out, log_sum_exp, *_ = interface._flash_attn_fwd(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        softmax_scale=scale,
        causal=causal,
        return_lse=True,
    )
    return out, log_sum_exp


def attend_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
    results: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write the gradients of ``q``, ``k`` and ``v`` into ``results``, which may be views as well."""
    interface._flash_attn_bwd(
        q,
        k,
        v,
        out,
        d_out,
        log_sum_exp,
        scale,
        causal,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        dq=results[0],
        dk=results[1],
        dv=results[2],
    )
