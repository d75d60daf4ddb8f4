"""Which results a layer that is not compiled keeps, where it recomputes only a part of its work."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_aten = torch.ops.aten
_GEMMS = {_aten.mm.default: 1, _aten.addmm.default: 2}
"""Matrix products, and which argument of each is the weight (in, out)."""
_ATTENTION = {
    "vl3train::qkv_attention",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_attention_math",
}


def _keep_gemms(_: Any, op: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    if op in _GEMMS or op._schema.name in _ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _keep_hidden_gemms(_: Any, op: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    # Only the MLP has products to intermediate_size: 6 of 7 parts of what a layer would keep, a third of its work.
    if op in _GEMMS:
        width_in, width_out = args[_GEMMS[op]].shape
        is_intermediate = width_out > width_in
        return CheckpointPolicy.PREFER_RECOMPUTE if is_intermediate else CheckpointPolicy.MUST_SAVE
    return _keep_gemms(_, op)


KEEP_GEMMS = functools.partial(create_selective_checkpoint_contexts, _keep_gemms)
KEEP_HIDDEN_GEMMS = functools.partial(create_selective_checkpoint_contexts, _keep_hidden_gemms)
