"""The folders of tests/config, for commands, with weights: headers of real sizes over files without content."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.config.conftest import workplace as bare_workplace
from vl3train.contracts.shapes import ENCODER, LANGUAGE_MODELS
from vl3train.model.weights.headers.described import describe_whole

__all__ = ["bare_workplace", "sparse_checkpoint", "workplace"]

TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>")


def write_tokenizer_json(folder: Path, first: int = 151_643) -> None:
    """A tokenizer.json with few words; its special tokens begin at ``first``."""
    ids = {"<|image_pad|>": first + 12, "<|video_pad|>": first + 13}  # as in Qwen2.5's tokenizer
    added = [{"content": token, "id": ids.get(token, first + at)} for at, token in enumerate(TOKENS)]
    content = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def sparse_checkpoint(folder: Path, size: str = "2b") -> Path:
    """A folder like a published checkpoint: gigabytes by its headers, kilobytes on the disk."""
    text, tied = LANGUAGE_MODELS[size], size == "2b"
    config = {
        "model_type": "video_llama_3",
        "tie_word_embeddings": tied,
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "vocab_size": text.vocab_size,
            "tie_word_embeddings": tied,
        },
        "vision_config": {
            "hidden_size": ENCODER.hidden_size,
            "intermediate_size": ENCODER.intermediate_size,
            "num_hidden_layers": ENCODER.num_layers,
            "num_attention_heads": ENCODER.num_heads,
            "patch_size": 14,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_sparse(folder / "model.safetensors", describe_whole(config).tensors())
    write_tokenizer_json(folder)
    return folder


def write_sparse(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file in bfloat16 whose header is whole and whose data takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [end, end := end + 2 * math.prod(shape)],
        }
    raw = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        stream.truncate(8 + len(raw) + end)


@pytest.fixture
def workplace(bare_workplace: Path) -> Path:
    """The working directory of tests/config, with a whole checkpoint of the 2B."""
    sparse_checkpoint(bare_workplace / "checkpoint")
    return bare_workplace
