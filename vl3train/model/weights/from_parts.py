"""Loads a model: SigLIP and Qwen2 put together, or a whole checkpoint. A key that does not fit is an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, Qwen2Config, VideoLlama3Config, VideoLlama3ForConditionalGeneration

from vl3train.config.paths import encoder_folder, model_type
from vl3train.contracts.shapes import ENCODER
from vl3train.contracts.tokens import PATCH_SIZE
from vl3train.model.meta_build import MetaBuild
from vl3train.model.weights.headers.faults import read_object, refuse
from vl3train.model.weights.headers.files import read_stored
from vl3train.model.weights.headers.folder import Kind, inspect_folder
from vl3train.model.weights.headers.names import PROJECTOR_PREFIX, encoder_names, from_original, from_qwen2
from vl3train.model.weights.headers.vocabulary import PLACEHOLDERS, read_vocabulary

VISION_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
)
"""All fields of the encoder's config, copied, because the class defaults are those of another model (ViT-base)."""

PUBLISHED_ENCODER = {
    "hidden_size": ENCODER.hidden_size,
    "intermediate_size": ENCODER.intermediate_size,
    "num_hidden_layers": ENCODER.num_layers,
    "num_attention_heads": ENCODER.num_heads,
    "patch_size": PATCH_SIZE,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
}
"""The encoder's config in every checkpoint of the original code: DAMO-NLP-SG/SigLIP-NaViT."""


def init_from_parts(
    vision_encoder_from: str,
    language_model_from: str,
    *,
    image_token_id: int,
    video_token_id: int,
    initializer_range: float,
    seed: int,
    dtype: torch.dtype,
) -> VideoLlama3ForConditionalGeneration:
    """A VideoLLaMA3 with exactly the weights of a SigLIP and a Qwen2 or Qwen2.5 checkpoint (folders or hub names).

    In place of a SigLIP it may be a VideoLLaMA3's folder or run: its encoder is taken.

    The projector is drawn with ``seed``: normal with standard deviation ``initializer_range``, biases zero. Raises
    ValueError, naming the keys, when a source has an unknown key or lacks a needed one.
    """
    vision_folder = _folder_of(str(encoder_folder(vision_encoder_from)))
    language_folder = _folder_of(language_model_from)
    refuse(vision_encoder_from, inspect_folder(vision_folder, Kind.encoder).faults)
    refuse(language_model_from, inspect_folder(language_folder, Kind.language_model).faults)
    config: Any = VideoLlama3Config(
        text_config=_text_config(language_folder),
        vision_config=_vision_config(vision_folder),
        image_token_id=image_token_id,
        video_token_id=video_token_id,
    )
    # On both levels: transformers before 5.17 leaves the head untied, hence random, when only one says so.
    config.tie_word_embeddings = config.text_config.tie_word_embeddings
    config.text_config.use_cache = False
    weights = {**_encoder_weights(vision_folder), **_qwen2_weights(language_folder)}
    generator = torch.Generator().manual_seed(seed)
    vision_size, text_size = config.vision_config.hidden_size, config.text_config.hidden_size
    for layer, inputs in (("readout.0", vision_size), ("readout.2", text_size)):
        matrix = torch.empty(text_size, inputs).normal_(std=initializer_range, generator=generator)
        weights[f"{PROJECTOR_PREFIX}{layer}.weight"] = matrix
        weights[f"{PROJECTOR_PREFIX}{layer}.bias"] = torch.zeros(text_size)
    return _build(config, weights, dtype, f"{vision_encoder_from} and {language_model_from}")


def load_model(
    folder_or_name: str | Path, dtype: torch.dtype, tokenizer_from: Path | None = None
) -> VideoLlama3ForConditionalGeneration:
    """The model of a whole checkpoint. Raises ValueError, naming everything that is missing or does not fit.

    Takes Hugging Face form (model_type video_llama_3), and the form of the original code (videollama3_qwen2), which has
    other names for the same weights. No code of a checkpoint is run. The original's has no ids for the placeholders of
    Hugging Face form: they come from the tokenizer in ``tokenizer_from``, or else in the checkpoint's folder.
    """
    folder = _folder_of(str(folder_or_name))
    refuse(folder_or_name, inspect_folder(folder, Kind.whole).faults)
    described, _ = read_object(folder / "config.json")
    if described["model_type"] == "videollama3_qwen2":
        weights = convert_original_keys(dict(_read_weights(folder)))
        config = convert_original_config(described, **placeholder_ids(tokenizer_from or folder))
        return _build(config, weights, dtype, str(folder_or_name))
    return _load_checked(str(folder_or_name), str(folder), dtype=dtype)


def placeholder_ids(folder: Path) -> dict[str, int]:
    """``image_token_id`` and ``video_token_id`` by a folder's tokenizer; empty where it has none."""
    vocabulary, _ = read_vocabulary(folder)
    return {} if vocabulary is None else {name: vocabulary.ids[token] for name, token in PLACEHOLDERS.items()}


def convert_original_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a ``videollama3_qwen2`` checkpoint under the names of transformers' model; tensors unchanged."""
    return {new: tensor for name, tensor in state_dict.items() if (new := from_original(name)) is not None}


def convert_original_config(
    described: Mapping[str, Any], image_token_id: int = 151_655, video_token_id: int = 151_656
) -> VideoLlama3Config:
    """The config that belongs to ``convert_original_keys``.

    The placeholders are Qwen2.5's own, by their ids in its tokenizer. The original code has ``<image>``; visual tokens
    replace its embedding in any case. A config of the original training names an encoder instead of describing it
    (vision_encoder): its only one has the published sizes.
    """
    vision = described.get("vision_encoder_config")
    if not isinstance(vision, Mapping):
        vision = PUBLISHED_ENCODER
    text_fields = Qwen2Config().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    text = {key: value for key, value in described.items() if key in text_fields | {"rope_theta"}}
    config: Any = VideoLlama3Config(
        text_config={"model_type": "qwen2", **text, "use_cache": False},
        vision_config={key: vision[key] for key in VISION_FIELDS if key in vision},
        image_token_id=image_token_id,
        video_token_id=video_token_id,
    )
    config.tie_word_embeddings = config.text_config.tie_word_embeddings
    return config


def assert_rope_float32(model: torch.nn.Module) -> None:
    """Raise ValueError when rotary frequencies are not float32: in bfloat16 they lose positions of some thousands."""
    wrong = [
        f"{name} is {buffer.dtype}"
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and buffer.dtype != torch.float32
    ]
    if wrong:
        raise ValueError(
            f"rotary frequencies must stay float32 ({'; '.join(wrong)}): load with "
            "from_pretrained(dtype=...) and never cast a whole model with .to(dtype) or .bfloat16()"
        )


def _text_config(folder: Path) -> dict[str, Any]:
    return AutoConfig.from_pretrained(str(folder), trust_remote_code=False).to_dict()


def _vision_config(folder: Path) -> dict[str, Any]:
    described: Any = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    vision = described if described.model_type == "siglip_vision_model" else described.vision_config
    return {key: getattr(vision, key) for key in VISION_FIELDS}


def _encoder_weights(folder: Path) -> dict[str, Tensor]:
    """The encoder's weights."""
    rename = encoder_names(model_type(folder))
    named = ((rename(name), tensor) for name, tensor in _read_weights(folder))
    return {name: tensor for name, tensor in named if name is not None}


def _qwen2_weights(folder: Path) -> dict[str, Tensor]:
    named = ((from_qwen2(name), tensor) for name, tensor in _read_weights(folder))
    return {name: tensor for name, tensor in named if name is not None}


def _build(
    config: VideoLlama3Config, weights: dict[str, Tensor], dtype: torch.dtype, source: str
) -> VideoLlama3ForConditionalGeneration:
    """The model with exactly these weights."""
    embedding = weights.get("model.language_model.embed_tokens.weight")
    if config.tie_word_embeddings:
        head = weights.pop("lm_head.weight", embedding)
        if head is not None and (embedding is None or not torch.equal(head, embedding)):
            raise ValueError(f"{source}: config.json ties lm_head and embed_tokens, but they differ")
    state = {name: tensor.to(dtype) for name, tensor in weights.items()}
    return _load_checked(source, None, config=config, state_dict=state, dtype=dtype)


def _load_checked(source: str, folder: str | None, **what: Any) -> VideoLlama3ForConditionalGeneration:
    """The model by transformers' ``from_pretrained``. Raises ValueError unless every key fitted."""
    with MetaBuild():
        loaded: Any = VideoLlama3ForConditionalGeneration.from_pretrained(
            folder, output_loading_info=True, attn_implementation="sdpa", **what
        )
    model, info = loaded
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(str(key) for key in info[kind]):
            shown = ", ".join(keys[:20]) + (f" and {len(keys) - 20} more" if len(keys) > 20 else "")
            problems.append(f"{len(keys)} {kind.replace('_', ' ')}: {shown}")
    if problems:
        raise ValueError(f"{source} does not fit VideoLLaMA3. {'; '.join(problems)}")
    head, embedding = model.lm_head.weight, model.model.language_model.embed_tokens.weight
    if model.config.tie_word_embeddings and head is not embedding:
        raise ValueError(
            f"{source}: config.tie_word_embeddings is true, but transformers left lm_head untied"
        )
    model.config.text_config.use_cache = False
    assert_rope_float32(model)
    return model


def _folder_of(folder_or_name: str) -> Path:
    """A local folder itself, or the folder of a hub name's files, from the cache or downloaded."""
    if Path(folder_or_name).is_dir():
        return Path(folder_or_name)
    return Path(snapshot_download(folder_or_name, allow_patterns=["*.json", "*.safetensors", "*.bin"]))


def _read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder that ``inspect_folder`` found whole."""
    for file in read_stored(folder).files:
        if file.suffix == ".bin":
            yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()
            continue
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a safetensors handle is not a dict
                yield name, tensors.get_tensor(name)
