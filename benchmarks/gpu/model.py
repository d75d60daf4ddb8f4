"""VideoLLaMA3 of the published shapes with random weights, made where it will train."""

from __future__ import annotations

from typing import Any

import torch
from transformers import VideoLlama3Config, VideoLlama3ForConditionalGeneration

from benchmarks.data.packs import PUBLISHED, TINY, Mix
from benchmarks.gpu.rows import Row
from vl3train.config.choices import AdapterKind
from vl3train.config.schema import AdapterConfig
from vl3train.contracts.shapes import ENCODER, LANGUAGE_MODELS, TowerShape
from vl3train.model.adapters import add_adapters
from vl3train.model.layers.nf4_linear import hold_in_4_bits
from vl3train.model.trainable import set_trainable
from vl3train.model.weights.from_parts import assert_rope_float32

TINY_ENCODER = TowerShape(
    num_layers=2,
    hidden_size=48,
    intermediate_size=64,
    num_heads=4,
    num_kv_heads=4,
    head_dim=12,
    is_decoder=False,
)
TINY_LANGUAGE_MODEL = TowerShape(
    num_layers=2,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    is_decoder=True,
    vocab_size=1024,
)


def mix_of(size: str) -> Mix:
    """What samples the model of this size is given."""
    return TINY if size == "tiny" else PUBLISHED


def model_config(size: str) -> VideoLlama3Config:
    """The published config of ``2b`` or ``7b``, or two layers of everything."""
    tied, mix = size != "7b", mix_of(size)
    encoder = TINY_ENCODER if size == "tiny" else ENCODER
    language_model = TINY_LANGUAGE_MODEL if size == "tiny" else LANGUAGE_MODELS[size]
    config = VideoLlama3Config(
        text_config={
            "model_type": "qwen2",
            "vocab_size": language_model.vocab_size,
            "num_key_value_heads": language_model.num_kv_heads,
            "max_position_embeddings": 131072,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "tie_word_embeddings": tied,
            "use_cache": False,
            **_sizes(language_model),
        },
        vision_config={
            "num_channels": 3,
            "patch_size": 14,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            **_sizes(encoder),
        },
        image_token_id=mix.image_pad_id,
        video_token_id=mix.video_pad_id,
        tie_word_embeddings=tied,
    )
    config._attn_implementation = "sdpa"
    return config


def _sizes(tower: TowerShape) -> dict[str, int]:
    """As the configs of both towers call them."""
    return {
        "num_hidden_layers": tower.num_layers,
        "hidden_size": tower.hidden_size,
        "intermediate_size": tower.intermediate_size,
        "num_attention_heads": tower.num_heads,
    }


def build_model(size: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model of ``model_config(size)``, drawn on ``device`` in ``dtype``: no copy on the host, none in float32."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = VideoLlama3ForConditionalGeneration(model_config(size))
    finally:
        torch.set_default_dtype(before)
    assert_rope_float32(model)
    return model


def build_row_model(row: Row, device: torch.device) -> Any:
    """The row's model, the parts that the row trains switched on, adapters added."""
    hf_model = build_model(row.model, device)
    set_trainable(hf_model, row.trains)
    if row.lora:
        add_adapters(hf_model, AdapterConfig(kind=AdapterKind.lora, rank=row.rank, dropout=row.lora_dropout))
    if row.base_4bit:
        hold_in_4_bits(hf_model, ["language_model"], device)
    return hf_model
