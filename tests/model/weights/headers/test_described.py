"""The tensors that a config.json promises are those of transformers' own model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
)

from tests.conftest import tiny_config
from vl3train.config.load import load_config
from vl3train.model.weights.headers.described import (
    QWEN2,
    SIGLIP,
    describe_encoder,
    describe_language_model,
    describe_whole,
)


def written(config, folder: Path) -> dict:
    """A config as a folder's config.json has it, without what is transformers' default."""
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def shapes(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model(tmp_path, tied):
    config = tiny_config(500, 3, 4)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    with torch.device("meta"):
        expected = shapes(VideoLlama3ForConditionalGeneration(config))
    if tied:
        del expected["lm_head.weight"]
    found = describe_whole(written(config, tmp_path))
    assert found.tensors() == expected
    assert found.faults == []
    assert {name: found.token_ids[name] for name in ("image_token_id", "video_token_id")} == {
        "image_token_id": 3,
        "video_token_id": 4,
    }


def test_sizes_that_a_config_leaves_out_are_transformers_own():
    assert {key: getattr(Qwen2Config(), key) for key in QWEN2} == QWEN2
    for config in (SiglipVisionConfig(), VideoLlama3Config().vision_config):
        assert {key: getattr(config, key) for key in SIGLIP} == SIGLIP
    ids = describe_whole({"model_type": "video_llama_3"}).token_ids
    assert ids["image_token_id"] == VideoLlama3Config().image_token_id
    assert ids["video_token_id"] == VideoLlama3Config().video_token_id


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model(tmp_path, tied):
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=120,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        names = shapes(Qwen2ForCausalLM(config))
    found = describe_language_model(written(config, tmp_path))
    expected = {found.rename(name): shape for name, shape in names.items()}
    if tied:
        del expected["lm_head.weight"]
    assert found.tensors() == expected


def test_an_encoder_is_found_in_a_whole_siglip(tmp_path):
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SiglipConfig(vision_config={**vision, "patch_size": 14}, text_config={"num_hidden_layers": 1})
    with torch.device("meta"):
        names = shapes(SiglipModel(config))
    found = describe_encoder(written(config, tmp_path))
    assert found.tensors() == {
        renamed: shape for name, shape in names.items() if (renamed := found.rename(name)) is not None
    }


@pytest.mark.parametrize("size", ["2b", "7b"])
def test_the_published_sizes_have_their_number_of_parameters(size):
    from vl3train.contracts.shapes import ENCODER, LANGUAGE_MODELS
    from vl3train.model.weights.headers.described import Described
    from vl3train.model.weights.headers.names import as_it_is
    from vl3train.model.weights.headers.start import part_sizes

    described = Described(as_it_is, ENCODER, LANGUAGE_MODELS[size], has_projector=True, tied=size == "2b")
    published = load_config(["stage=1", f"model={size}", "data.root=."]).model.num_parameters
    assert part_sizes([described]) == published


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": "28"}, "num_hidden_layers='28' must be whole numbers"),
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized (awq)"),
    ],
)
def test_a_config_that_no_model_has_is_a_fault(change, says):
    faults = describe_language_model({"model_type": "qwen2", **change}).faults
    assert len(faults) == 1
    assert says in faults[0].what


def test_an_encoder_of_other_patches_is_a_fault():
    assert "patches of 16 pixels" in describe_encoder({"model_type": "siglip_vision_model"}).faults[0].what
