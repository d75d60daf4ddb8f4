"""flash-attn-4, forward and backward; model/attention/qkv_op.py wraps it in an op. Importing this needs the library.

T tokens (or patches), H query heads, Hkv key and value heads, D values a head.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

from torch import Tensor

from vl3train.model.attention.flash_attn_4_cache import cache_kernels
from vl3train.model.attention.shared_prefix import Bounds, Heads

cache_kernels(__file__)  # before the library is imported: it reads its settings once
# nvidia-cutlass-dsl says so of flash-attn-4's own argument, once for each kernel it compiles. The kernels are right.
warnings.filterwarnings(
    "ignore", message=r"Argument aux_data \(position \d+\) cannot be converted to a JitArgument"
)

from flash_attn.cute import interface  # noqa: E402
from flash_attn.cute.flash_bwd_sm90 import FlashAttentionBackwardSm90  # noqa: E402


def patch_head_dim(kernel: Any) -> None:
    """Make the backward kernels for Hopper agree on the length of a row of dq.

    In 4.0.0b36 the main kernel rounds the head dimension up to a multiple of 16; the kernels before and after it round
    to 32. For head dimensions 72 and 80 dq is then wrong (relative error 1.2), and no error is raised. Here the main
    kernel rounds to 32 too, as in https://github.com/Dao-AILab/flash-attention/pull/2896. (With 16 everywhere it is no
    faster, and dq and dk were wrong now and then.) Every run checks the result when it starts
    (model/attention/check.py).
    """
    init = kernel.__init__

    @functools.wraps(init)
    def patched(
        self: Any, dtype: Any, head_dim: int, head_dim_v: int | None = None, *args: Any, **kwargs: Any
    ) -> None:
        init(self, dtype, head_dim, head_dim_v, *args, **kwargs)
        if self.dKV_swapAB:  # all kernels round to 64
            return
        head_dim_v = head_dim_v or head_dim
        self.tile_hdim, self.tile_hdimv = -(-head_dim // 32) * 32, -(-head_dim_v // 32) * 32
        self.check_hdim_oob = head_dim != self.tile_hdim
        self.check_hdim_v_oob = head_dim_v != self.tile_hdimv

    kernel.__init__ = patched


patch_head_dim(FlashAttentionBackwardSm90)


def attend(
    q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, longest: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each segment of queries on that of keys: (T, H, D), and the log-sum-exp of each row (H, T) float32.

    ``q``, ``k`` and ``v`` may be views, as long as the values of a head lie side by side. ``bounds`` are those of the
    segments of queries and of keys, none of them longer than ``longest``.
    """
    out, log_sum_exp, *_ = interface._flash_attn_fwd(
        q,
        k,
        v,
        cu_seqlens_q=bounds[0],
        cu_seqlens_k=bounds[1],
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=causal,
        return_lse=True,
    )
    return out, log_sum_exp


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
    """Write the gradients of queries, keys and values into ``d_qkv``, which may be views as well.

    ``outputs`` are those of ``attend``.
    """
    q, k, v = qkv
    out, log_sum_exp = outputs
    interface._flash_attn_bwd(
        q,
        k,
        v,
        out,
        d_out,
        log_sum_exp,
        scale,
        causal,
        cu_seqlens_q=bounds[0],
        cu_seqlens_k=bounds[1],
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        dq=d_qkv[0],
        dk=d_qkv[1],
        dv=d_qkv[2],
    )
