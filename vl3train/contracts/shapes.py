"""Sizes of the two towers of VideoLLaMA3: as published, and as read from a transformers config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerShape:
    """Sizes of the vision encoder, or of the language model.

    ``is_decoder`` is the language model: causal attention, RMSNorm and a gated MLP (SwiGLU). The encoder has full
    attention, LayerNorm and an MLP with GELU.
    """

    num_layers: int
    hidden_size: int  # values of a row
    intermediate_size: int  # values of a row inside the MLP
    num_heads: int  # query heads
    num_kv_heads: int  # key heads, and as many value heads
    head_dim: int
    is_decoder: bool
    vocab_size: int = 0  # 0 for the encoder


ENCODER = TowerShape(
    num_layers=27,
    hidden_size=1152,
    intermediate_size=4304,
    num_heads=16,
    num_kv_heads=16,
    head_dim=72,
    is_decoder=False,
)
"""The encoder of both published sizes: SigLIP so400m."""

LANGUAGE_MODELS = {
    "2b": TowerShape(
        num_layers=28,
        hidden_size=1536,
        intermediate_size=8960,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        is_decoder=True,
        vocab_size=151_936,
    ),
    "7b": TowerShape(
        num_layers=28,
        hidden_size=3584,
        intermediate_size=18_944,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        is_decoder=True,
        vocab_size=152_064,
    ),
}
"""The language models of the published sizes, by the names of configs/model: Qwen2.5 1.5B and 7B."""


def tower_shapes(hf_config: Any) -> tuple[TowerShape, TowerShape]:
    """The encoder and the language model of a ``VideoLlama3Config``."""
    vision, text = hf_config.vision_config, hf_config.text_config
    encoder = TowerShape(
        num_layers=vision.num_hidden_layers,
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_heads=vision.num_attention_heads,
        num_kv_heads=vision.num_attention_heads,
        head_dim=vision.hidden_size // vision.num_attention_heads,
        is_decoder=False,
    )
    language_model = TowerShape(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        # Qwen2's config has a head_dim only where it is not this quotient.
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        is_decoder=True,
        vocab_size=text.vocab_size,
    )
    return encoder, language_model


NF4_BLOCK, NF4_SCALE_BLOCK = 64, 256
"""Values of a weight in 4 bits that share a scale, and scales that share a scale of theirs: model/kernels/nf4.py."""


def nf4_bytes(num_values: int) -> int:
    """Bytes of a weight in 4 bits.

    >>> round(8 * nf4_bytes(2**20) / 2**20, 3)
    4.127
    """
    blocks = -(-num_values // NF4_BLOCK)
    return num_values // 2 + -(-blocks // 4) * 4 + 4 * (-(-blocks // NF4_SCALE_BLOCK) + 1)
