"""Loads a model: SigLIP and Qwen2 put together, or a whole checkpoint. A key that does not fit is an error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, Qwen2Config, VideoLlama3Config, VideoLlama3ForConditionalGeneration

from vl3train.contracts.tokens import PATCH_SIZE
from vl3train.model.weights.damaged import refuse_damaged

PROJECTOR_PREFIX = "model.projector."
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

    The projector is drawn with ``seed``: normal with standard deviation ``initializer_range``, biases zero. Raises
    ValueError, naming the keys, when a source has an unknown key or lacks a needed one.
    """
    vision_folder, language_folder = _folder_of(vision_encoder_from), _folder_of(language_model_from)
    config: Any = VideoLlama3Config(
        text_config=_text_config(language_folder),
        vision_config=_vision_config(vision_folder),
        image_token_id=image_token_id,
        video_token_id=video_token_id,
    )
    # On both levels: transformers before 5.17 leaves the head untied, hence random, when only one says so.
    config.tie_word_embeddings = config.text_config.tie_word_embeddings
    config.text_config.use_cache = False
    check_vocabulary(config, max(image_token_id, video_token_id))
    weights = {**_siglip_weights(vision_folder), **_qwen2_weights(language_folder)}
    generator = torch.Generator().manual_seed(seed)
    vision_size, text_size = config.vision_config.hidden_size, config.text_config.hidden_size
    for layer, inputs in (("readout.0", vision_size), ("readout.2", text_size)):
        matrix = torch.empty(text_size, inputs).normal_(std=initializer_range, generator=generator)
        weights[f"{PROJECTOR_PREFIX}{layer}.weight"] = matrix
        weights[f"{PROJECTOR_PREFIX}{layer}.bias"] = torch.zeros(text_size)
    return _build(config, weights, dtype, f"{vision_encoder_from} and {language_model_from}")


def load_model(folder_or_name: str | Path, dtype: torch.dtype) -> VideoLlama3ForConditionalGeneration:
    """The model of a whole checkpoint. Raises ValueError, naming the keys, when one is missing or does not fit.

    Takes Hugging Face form (model_type video_llama_3), and the form of the original code (videollama3_qwen2), which has
    other names for the same weights.
    """
    folder = _folder_of(str(folder_or_name))
    described = _read_json(folder / "config.json")
    model_type = described.get("model_type")
    if model_type == "videollama3_qwen2":
        weights = convert_original_keys(dict(_read_weights(folder)))
        return _build(convert_original_config(described), weights, dtype, str(folder_or_name))
    if model_type != "video_llama_3":
        raise ValueError(
            f"{folder_or_name} has model_type {model_type}; a stage starts from video_llama_3 (Hugging Face "
            "form) or videollama3_qwen2 (the original code's). Stage 1 starts from parts: unset stage.init_from "
            "and set model.vision_encoder_from and model.language_model_from"
        )
    refuse_damaged(folder)
    return _checked(
        VideoLlama3ForConditionalGeneration.from_pretrained(
            str(folder), dtype=dtype, output_loading_info=True, attn_implementation="sdpa"
        ),
        str(folder_or_name),
    )


def convert_original_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a ``videollama3_qwen2`` checkpoint under the names of transformers' model; tensors unchanged."""
    converted = {}
    for name, tensor in state_dict.items():
        for pattern, replacement in ORIGINAL_PREFIXES:
            name, changed = pattern.subn(replacement, name)
            if changed:
                break
        converted[name] = tensor
    return converted


def convert_original_config(described: Mapping[str, Any]) -> VideoLlama3Config:
    """The config that belongs to ``convert_original_keys``.

    The placeholders are Qwen2.5's own. The original code has ``<image>``; visual tokens replace its embedding in any
    case. Raises ValueError without a ``vision_encoder_config``.
    """
    vision = described.get("vision_encoder_config")
    if not isinstance(vision, Mapping):
        raise ValueError(
            "the checkpoint's config.json has no vision_encoder_config, so the size of its encoder is unknown; "
            "take the released folder (DAMO-NLP-SG/VideoLLaMA3-*) or add the entry"
        )
    text_fields = Qwen2Config().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    text = {key: value for key, value in described.items() if key in text_fields | {"rope_theta"}}
    config: Any = VideoLlama3Config(
        text_config={"model_type": "qwen2", **text, "use_cache": False},
        vision_config={key: vision[key] for key in VISION_FIELDS if key in vision},
    )
    config.tie_word_embeddings = config.text_config.tie_word_embeddings
    return config


def check_vocabulary(config: Any, largest_token_id: int) -> None:
    """Raise ValueError when the embedding has no row for the tokenizer's largest id."""
    rows = config.text_config.vocab_size
    if largest_token_id >= rows:
        raise ValueError(
            f"token id {largest_token_id} has no row in the language model's embedding of {rows} rows; Qwen2 "
            "and Qwen2.5 pad theirs to 151936 or more. Take the tokenizer that belongs to "
            "model.language_model_from, or enlarge that model first "
            f"(resize_token_embeddings({largest_token_id + 1}) and save_pretrained)"
        )


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
    config = AutoConfig.from_pretrained(str(folder))
    if config.model_type != "qwen2":
        raise ValueError(
            f"{folder} has model_type {config.model_type}; the language model is a Qwen2 or Qwen2.5"
        )
    return config.to_dict()


def _vision_config(folder: Path) -> dict[str, Any]:
    described = AutoConfig.from_pretrained(str(folder))
    if described.model_type not in ("siglip", "siglip_vision_model"):
        raise ValueError(f"{folder} has model_type {described.model_type}; the vision encoder is a SigLIP")
    vision = described.vision_config if described.model_type == "siglip" else described
    if vision.patch_size != PATCH_SIZE:
        raise ValueError(
            f"{folder} has patches of {vision.patch_size} pixels; VideoLLaMA3's have {PATCH_SIZE}"
        )
    return {key: getattr(vision, key) for key in VISION_FIELDS}


def _siglip_weights(folder: Path) -> dict[str, Tensor]:
    """The encoder's weights, of a SiglipVisionModel or a SiglipModel, whose keys have one more prefix."""
    names = ((name.removeprefix("vision_model."), tensor) for name, tensor in _read_weights(folder))
    return {f"model.vision_model.{name}": tensor for name, tensor in names if not SIGLIP_DROPPED.match(name)}


def _qwen2_weights(folder: Path) -> dict[str, Tensor]:
    return {
        name if name == "lm_head.weight" else f"model.language_model.{name.removeprefix('model.')}": tensor
        for name, tensor in _read_weights(folder)
    }


def _build(
    config: VideoLlama3Config, weights: dict[str, Tensor], dtype: torch.dtype, source: str
) -> VideoLlama3ForConditionalGeneration:
    """The model with exactly these weights."""
    weights = {name: tensor for name, tensor in weights.items() if not ROTARY_BUFFERS.search(name)}
    embedding = weights.get("model.language_model.embed_tokens.weight")
    if config.tie_word_embeddings:
        head = weights.pop("lm_head.weight", embedding)
        if head is not None and (embedding is None or not torch.equal(head, embedding)):
            raise ValueError(f"{source}: config.json ties lm_head and embed_tokens, but they differ")
    return _checked(
        VideoLlama3ForConditionalGeneration.from_pretrained(
            None,
            config=config,
            state_dict={name: tensor.to(dtype) for name, tensor in weights.items()},
            dtype=dtype,
            output_loading_info=True,
            attn_implementation="sdpa",
        ),
        source,
    )


def _checked(loaded: Any, source: str) -> VideoLlama3ForConditionalGeneration:
    """The model of a (model, loading info) pair. Raises ValueError unless every key fitted."""
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


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file.parent} holds no {file.name}: it is not a checkpoint folder")
    return json.loads(file.read_text())


def _read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint folder: safetensors where there are any, else pytorch_model*.bin."""
    files = sorted(folder.glob("model*.safetensors"))
    refuse_damaged(folder)
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a safetensors handle is not a dict
                yield name, tensors.get_tensor(name)
    if files:
        return
    files = sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"{folder} holds neither model*.safetensors nor pytorch_model*.bin")
    for file in files:
        yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()
