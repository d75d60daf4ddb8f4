"""Names of the weights in the checkpoints that are read, and their names in the model."""

from __future__ import annotations

import re
from collections.abc import Callable

PROJECTOR_PREFIX = "model.projector."

SIGLIP_DROPPED = re.compile(
    r"text_model\.|logit_(scale|bias)$|head\.|embeddings\.position_(embedding\.weight|ids)$"
)
"""SigLIP's keys that VideoLLaMA3 does not use: the text tower, the pooling head, learned positions."""
ROTARY_BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$")
"""Old versions of transformers wrote these; now they are computed from the config."""
ORIGINAL_PREFIXES = (
    (re.compile(r"^model\.vision_encoder\.(vision_encoder\.)?"), "model.vision_model."),
    (re.compile(r"^model\.mm_projector\."), PROJECTOR_PREFIX),
    (re.compile(r"^model\.(?=embed_tokens\.|layers\.|norm\.)"), "model.language_model."),
)
"""Prefixes in checkpoints of the original code, released or new from its training, and the names here."""


def from_siglip(name: str) -> str | None:
    """The name of a SigLIP weight here, None for one that is not used. A SiglipModel's keys have one more prefix.

    >>> from_siglip("vision_model.post_layernorm.bias"), from_siglip("logit_scale")
    ('model.vision_model.post_layernorm.bias', None)
    """
    name = name.removeprefix("vision_model.")
    return None if SIGLIP_DROPPED.match(name) else f"model.vision_model.{name}"


def only_encoder(name: str) -> str | None:
    """The name of an encoder's weight in Hugging Face form (model_type video_llama_3), None for all others.

    >>> only_encoder("model.vision_model.post_layernorm.bias"), only_encoder("lm_head.weight")
    ('model.vision_model.post_layernorm.bias', None)
    """
    return name if name.startswith("model.vision_model.") else None


def encoder_names(model_type: str) -> Callable[[str], str | None]:
    """How the encoder's weights are called here, by what the checkpoint is."""
    return only_encoder if model_type == "video_llama_3" else from_siglip


def from_qwen2(name: str) -> str | None:
    """The name of a Qwen2 weight here, None for a buffer that is computed.

    >>> from_qwen2("model.norm.weight"), from_qwen2("lm_head.weight")
    ('model.language_model.norm.weight', 'lm_head.weight')
    """
    if ROTARY_BUFFERS.search(name):
        return None
    return name if name == "lm_head.weight" else f"model.language_model.{name.removeprefix('model.')}"


def from_original(name: str) -> str | None:
    """The name here of a weight of the original code (model_type videollama3_qwen2), None for a computed buffer.

    >>> from_original("model.mm_projector.readout.0.bias"), from_original("model.layers.0.rotary_emb.inv_freq")
    ('model.projector.readout.0.bias', None)
    """
    if ROTARY_BUFFERS.search(name):
        return None
    for pattern, replacement in ORIGINAL_PREFIXES:
        renamed, changed = pattern.subn(replacement, name)
        if changed:
            return renamed
    return name


def as_it_is(name: str) -> str | None:
    """The name of a weight in Hugging Face form (model_type video_llama_3)."""
    return name
