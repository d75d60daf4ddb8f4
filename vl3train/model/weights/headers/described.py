"""What a config.json says about a model: its sizes, its token ids, and with them every tensor that it must have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vl3train.contracts.shapes import ENCODER, TowerShape
from vl3train.contracts.tokens import PATCH_SIZE
from vl3train.model.weights.headers.faults import Fault
from vl3train.model.weights.headers.names import as_it_is, encoder_names, from_original, from_qwen2

QWEN2 = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
"""Sizes of transformers' Qwen2Config for keys that config.json leaves out."""
SIGLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "patch_size": 16,
}
"""The same of SiglipVisionConfig and of VideoLlama3VisionConfig."""

OTHER_CONFIG = "correct config.json, or take another checkpoint"
TOKEN_IDS = ("image_token_id", "video_token_id", "eos_token_id", "pad_token_id")


@dataclass(slots=True)
class Described:
    """What a config.json says. A tower is None where the model has none, or where its sizes cannot be read."""

    rename: Callable[[str], str | None]  # names in the files to names in the model
    encoder: TowerShape | None = None
    language_model: TowerShape | None = None
    has_projector: bool = False
    tied: bool = False
    token_ids: dict[str, int | list[int]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all weights by their names in the model; a tied head is left out."""
        found: dict[str, tuple[int, ...]] = {}
        if self.encoder is not None:
            found |= encoder_tensors(self.encoder)
        if self.language_model is not None:
            found |= language_tensors(self.language_model, tied=self.tied)
        if self.has_projector and self.encoder is not None and self.language_model is not None:
            found |= projector_tensors(self.encoder.hidden_size, self.language_model.hidden_size)
        return found


def describe_whole(config: Mapping[str, Any]) -> Described:
    """Of a ``video_llama_3`` or ``videollama3_qwen2`` model."""
    if config["model_type"] == "videollama3_qwen2":
        return _describe_original(config)
    found = Described(as_it_is, has_projector=True)
    text, vision = (_section(config, name, found.faults) for name in ("text_config", "vision_config"))
    if text.get("model_type", "qwen2") != "qwen2":
        found.faults.append(Fault(f"its language model is a {text['model_type']}, not a qwen2", OTHER_CONFIG))
    found.encoder, found.language_model = _encoder(vision, found.faults), _language_model(text, found.faults)
    found.tied = bool(config.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False))
    found.token_ids = _token_ids(text, ("eos_token_id", "pad_token_id"))
    # transformers' own defaults, which config.json may leave out
    found.token_ids |= {"image_token_id": 151_655, "video_token_id": 151_656}
    found.token_ids |= _token_ids(config, ("image_token_id", "video_token_id"))
    _refuse_quantized(config, found.faults)
    return found


def _describe_original(config: Mapping[str, Any]) -> Described:
    found = Described(from_original, has_projector=True)
    found.language_model = _language_model(config, found.faults)
    vision = config.get("vision_encoder_config")
    # The training code names an encoder (vision_encoder) instead, and its only one has the published sizes.
    found.encoder = _encoder(vision, found.faults) if isinstance(vision, Mapping) else ENCODER
    found.tied = bool(config.get("tie_word_embeddings", False))
    found.token_ids = _token_ids(config, ("eos_token_id", "pad_token_id"))
    _refuse_quantized(config, found.faults)
    return found


def describe_encoder(config: Mapping[str, Any]) -> Described:
    """Of a SigLIP, whole or only its encoder, or of a VideoLLaMA3."""
    found = Described(encoder_names(config["model_type"]))
    alone = config["model_type"] == "siglip_vision_model"
    vision = config if alone else _section(config, "vision_config", found.faults)
    found.encoder = _encoder(vision, found.faults)
    _refuse_quantized(config, found.faults)
    return found


def describe_language_model(config: Mapping[str, Any]) -> Described:
    """Of a Qwen2 or Qwen2.5."""
    found = Described(from_qwen2, tied=bool(config.get("tie_word_embeddings", False)))
    found.language_model = _language_model(config, found.faults)
    found.token_ids = _token_ids(config, ("eos_token_id", "pad_token_id"))
    _refuse_quantized(config, found.faults)
    return found


def encoder_tensors(tower: TowerShape) -> dict[str, tuple[int, ...]]:
    """Weights of the vision encoder by name."""
    width, inner = tower.hidden_size, tower.intermediate_size
    found: dict[str, tuple[int, ...]] = {
        "embeddings.patch_embedding.weight": (width, 3, PATCH_SIZE, PATCH_SIZE),
        "embeddings.patch_embedding.bias": (width,),
    }
    for layer in range(tower.num_layers):
        for norm in ("layer_norm1", "layer_norm2"):
            found |= _linear(f"encoder.layers.{layer}.{norm}", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= _linear(f"encoder.layers.{layer}.self_attn.{name}", width, width)
        found |= _linear(f"encoder.layers.{layer}.mlp.fc1", inner, width)
        found |= _linear(f"encoder.layers.{layer}.mlp.fc2", width, inner)
    found |= _linear("post_layernorm", width)
    return {f"model.vision_model.{name}": shape for name, shape in found.items()}


def projector_tensors(inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    """Weights of the projector by name."""
    return {
        **_linear("model.projector.readout.0", outputs, inputs),
        **_linear("model.projector.readout.2", outputs, outputs),
    }


def language_tensors(tower: TowerShape, *, tied: bool) -> dict[str, tuple[int, ...]]:
    """Weights of the language model by name, with its head unless that is the embedding."""
    width, inner = tower.hidden_size, tower.intermediate_size
    queries, keys = tower.num_heads * tower.head_dim, tower.num_kv_heads * tower.head_dim
    found: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (tower.vocab_size, width),
        "norm.weight": (width,),
    }
    for layer in range(tower.num_layers):
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            found |= _linear(f"layers.{layer}.self_attn.{name}", rows, width)
        found[f"layers.{layer}.self_attn.o_proj.weight"] = (width, queries)
        for name, shape in (
            ("gate_proj", (inner, width)),
            ("up_proj", (inner, width)),
            ("down_proj", (width, inner)),
        ):
            found[f"layers.{layer}.mlp.{name}.weight"] = shape
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"layers.{layer}.{norm}.weight"] = (width,)
    head = {} if tied else {"lm_head.weight": (tower.vocab_size, width)}
    return {f"model.language_model.{name}": shape for name, shape in found.items()} | head


def _linear(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _section(config: Mapping[str, Any], name: str, faults: list[Fault]) -> Mapping[str, Any]:
    section = config.get(name, {})
    if isinstance(section, Mapping):
        return section
    faults.append(Fault(f"config.json: {name} holds no options by name", OTHER_CONFIG))
    return {}


def _sizes(
    config: Mapping[str, Any], defaults: Mapping[str, int], faults: list[Fault]
) -> dict[str, int] | None:
    sizes = {key: config.get(key, default) for key, default in defaults.items()}
    if sizes.get("num_key_value_heads", 0) is None:  # as Qwen2Config reads it
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    most = {"num_hidden_layers": 10_000}  # no list of names that fills the memory
    wrong = [
        f"{key}={value!r}"
        for key, value in sizes.items()
        if type(value) is not int or not 0 < value < most.get(key, 2**31)
    ]
    if wrong:
        faults.append(Fault(f"config.json: {', '.join(wrong)} must be whole numbers above 0", OTHER_CONFIG))
        return None
    return sizes


def _encoder(config: Mapping[str, Any], faults: list[Fault]) -> TowerShape | None:
    sizes = _sizes(config, SIGLIP, faults)
    if sizes is None:
        return None
    if (sizes["patch_size"], sizes["num_channels"]) != (PATCH_SIZE, 3):
        what = (
            f"its encoder has patches of {sizes['patch_size']} pixels and {sizes['num_channels']} channels; "
            f"VideoLLaMA3's have {PATCH_SIZE} and 3"
        )
        faults.append(Fault(what, "take a SigLIP with patch14 in its name"))
        return None
    return TowerShape(
        num_layers=sizes["num_hidden_layers"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_heads=sizes["num_attention_heads"],
        num_kv_heads=sizes["num_attention_heads"],
        head_dim=sizes["hidden_size"] // sizes["num_attention_heads"],
        is_decoder=False,
    )


def _language_model(config: Mapping[str, Any], faults: list[Fault]) -> TowerShape | None:
    sizes = _sizes(config, QWEN2, faults)
    if sizes is None:
        return None
    return TowerShape(
        num_layers=sizes["num_hidden_layers"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_heads=sizes["num_attention_heads"],
        num_kv_heads=sizes["num_key_value_heads"],
        head_dim=int(config.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]),
        is_decoder=True,
        vocab_size=sizes["vocab_size"],
    )


def _token_ids(config: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, int | list[int]]:
    return {name: config[name] for name in names if isinstance(config.get(name), int | list)}


def _refuse_quantized(config: Mapping[str, Any], faults: list[Fault]) -> None:
    quantized = config.get("quantization_config")
    if isinstance(quantized, Mapping):
        method = quantized.get("quant_method", "an unnamed method")
        faults.append(
            Fault(f"its weights are quantized ({method})", "take the checkpoint that was not quantized")
        )
