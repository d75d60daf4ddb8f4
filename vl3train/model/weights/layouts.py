"""The layouts of a whole VideoLLaMA3 checkpoint: names of the weights and config.json, from one to another.

``hf`` is transformers' own (model_type video_llama_3). ``released`` and ``training`` are the original code's
(videollama3_qwen2), as it was published and as its training writes it; the encoder has one more prefix there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vl3train.model.weights.from_parts import VISION_FIELDS

LAYOUTS = ("hf", "released", "training")

HF_PREFIXES = (
    (re.compile(r"^model\.vision_model\."), {"released": "model.vision_encoder."}),
    (re.compile(r"^model\.projector\."), {"released": "model.mm_projector."}),
    (re.compile(r"^model\.language_model\."), {"released": "model."}),
)
TRAINING_ENCODER = "model.vision_encoder.vision_encoder."

NAMED_ENCODER = "DAMO-NLP-SG/SigLIP-NaViT"
"""The encoder that a config of the training names (scripts/convert_hf_checkpoint.py of the original code)."""


def from_hf(name: str, layout: str) -> str:
    """The name in ``layout`` of a weight in Hugging Face form.

    >>> from_hf("model.vision_model.post_layernorm.bias", "training")
    'model.vision_encoder.vision_encoder.post_layernorm.bias'
    """
    if layout == "hf":
        return name
    for pattern, names in HF_PREFIXES:
        renamed, changed = pattern.subn(names["released"], name)
        if changed:
            encoder = layout == "training" and "vision_model" in pattern.pattern
            return renamed.replace("model.vision_encoder.", TRAINING_ENCODER, 1) if encoder else renamed
    return name


def layout_of(config: Mapping[str, Any], names: Mapping[str, Any]) -> str:
    """The layout of a checkpoint, by its config.json and the names of its weights."""
    if config.get("model_type") == "video_llama_3":
        return "hf"
    return "training" if any(name.startswith(TRAINING_ENCODER) for name in names) else "released"


def original_config(
    config: Any,
    layout: str,
    *,
    dtype: str,
    image_tag_id: int,
    prune_frames: bool,
    auto_map: Mapping[str, str],
) -> dict[str, Any]:
    """The config.json of the original code, ``released`` or ``training``, for a ``VideoLlama3Config``."""
    text = config.text_config.to_dict()
    for key in ("rope_parameters", "dtype", "layer_types", "architectures", "model_type", "_name_or_path"):
        text.pop(key, None)
    rope = dict(config.text_config.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type", "default")
    vision = {key: getattr(config.vision_config, key) for key in VISION_FIELDS}
    described = {
        **text,
        "model_type": "videollama3_qwen2",
        "architectures": ["Videollama3Qwen2ForCausalLM"],
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"rope_type": kind, **rope},
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
        "torch_dtype": dtype,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config.vision_config.hidden_size,
        "use_token_compression": prune_frames,
        "image_token_index": image_tag_id,
        "vision_encoder": NAMED_ENCODER if layout == "training" else None,
        "vision_encoder_config": {"model_type": "videollama3_vision_encoder", **vision},
    }
    return {**described, "auto_map": dict(auto_map)} if auto_map else described
