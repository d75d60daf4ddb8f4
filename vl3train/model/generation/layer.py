"""One layer of the language model without a backward pass, for prefill and for decoding alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Rotated queries (R, H, D), rotated keys and values (R, Hkv, D) -> (R, H, D)."""


def layer_rows(
    layer: Any, hidden_RH: Tensor, cos_RD: Tensor, sin_RD: Tensor, attend: Attend, rows: Tensor | None = None
) -> Tensor:
    """Qwen2DecoderLayer over R rows: (R, H) -> (R, H), or (len(rows), H), those at ``rows``, where only they are read.

    It calls the modules themselves, so adapters and quantized weights take part. ``attend`` says which rows see which:
    in a prefill those before them in their segment, in a decoding step those in the cache.
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden_RH)
    linears = attention.q_proj, attention.k_proj, attention.v_proj
    q, k, v = (linear(normed).unflatten(-1, (-1, attention.head_dim)) for linear in linears)
    q, k = apply_rotary_pos_emb(q, k, cos_RD, sin_RD)
    attended = attend(q, k, v).flatten(-2)
    if rows is not None:
        hidden_RH, attended = hidden_RH[rows], attended[rows]
    hidden_RH = hidden_RH + attention.o_proj(attended)
    return hidden_RH + layer.mlp(layer.post_attention_layernorm(hidden_RH))
