from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
    VideoLlama3ForConditionalGeneration,
)

from vl3train.model.trainable import part_of
from vl3train.model.weights.from_parts import (
    assert_rope_float32,
    convert_original_keys,
    init_from_parts,
    load_model,
)

VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 56,
}
SETTINGS = {
    "image_token_id": 118,
    "video_token_id": 119,
    "initializer_range": 0.02,
    "seed": 7,
    "dtype": torch.float32,
}


def randomize(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def siglip(folder, whole):
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(text_config={**text, "vocab_size": 50}, vision_config=VISION)
    model = randomize(SiglipModel(config) if whole else SiglipVisionModel(config.vision_config))
    model.save_pretrained(folder)
    return model


def qwen2(folder, tied=True, **changes):
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=120,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        **changes,
    )
    model = randomize(Qwen2ForCausalLM(config))
    model.save_pretrained(folder)
    return model


@pytest.fixture
def parts(tmp_path):
    return str(tmp_path / "siglip"), str(tmp_path / "qwen2")


@pytest.mark.parametrize("whole", [True, False], ids=["SiglipModel", "SiglipVisionModel"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_both_towers_compute_what_their_sources_do(parts, whole, tied):
    source, text = siglip(parts[0], whole), qwen2(parts[1], tied)
    model = init_from_parts(*parts, **SETTINGS).eval()

    tower = source.vision_model if whole else source
    with torch.no_grad():
        tower.get_submodule("embeddings.position_embedding").weight.zero_()
        image = torch.rand(1, 3, 56, 56) * 2 - 1
        expected = tower(pixel_values=image).last_hidden_state[0]
        patches = image[0].unfold(1, 14, 14).unfold(2, 14, 14).permute(1, 2, 0, 3, 4).reshape(16, 588)
        grid = {"grid_thw": torch.tensor([[1, 4, 4]]), "merge_sizes": torch.tensor([1])}
        # With every patch at place 0 the rotation is none, which is what SigLIP computes without its
        # positions.
        at_zero = torch.zeros(16, 2, dtype=torch.long)
        ours = model.model.vision_model(patches, **grid, position_ids=at_zero).last_hidden_state
        rotated = model.model.vision_model(patches, **grid).last_hidden_state
        assert torch.equal(ours, expected)
        assert not torch.allclose(rotated, expected, atol=1e-3)

        ids = torch.randint(0, 118, (2, 9))
        assert torch.equal(model(input_ids=ids).logits, text(input_ids=ids).logits)
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied
    assert model.config.tie_word_embeddings == model.config.text_config.tie_word_embeddings == tied
    assert not model.config.text_config.use_cache
    assert model.config.text_config._attn_implementation == "sdpa"


def test_the_projector_follows_from_the_seed_alone(parts):
    siglip(parts[0], True)
    qwen2(parts[1])
    torch.manual_seed(0)
    one = init_from_parts(*parts, **SETTINGS)
    torch.manual_seed(1)
    same, other = init_from_parts(*parts, **SETTINGS), init_from_parts(*parts, **{**SETTINGS, "seed": 8})
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name])
        drawn = part_of(name) == "projector" and name.endswith("weight")
        assert torch.equal(tensor, other.state_dict()[name]) != drawn
    readout = one.model.projector.readout
    assert float(readout[2].weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not readout[0].bias.any()


def test_bfloat16_weights_keep_float32_rotary_frequencies(parts):
    siglip(parts[0], True)
    qwen2(parts[1])
    model = init_from_parts(*parts, **{**SETTINGS, "dtype": torch.bfloat16})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert_rope_float32(model)
    with pytest.raises(ValueError, match=r"inv_freq is torch.bfloat16"):
        assert_rope_float32(model.bfloat16())


def edit(folder, change):
    """Rewrite a checkpoint's only weight file."""
    from pathlib import Path

    file = Path(folder) / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def test_a_key_of_no_use_or_a_missing_one_is_named(parts):
    siglip(parts[0], True)
    qwen2(parts[1])
    edit(parts[0], lambda w: w.update({"vision_model.encoder.layers.0.gate": torch.zeros(3)}))
    edit(parts[1], lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"no place in the model: vision_model\.encoder\.layers\.0\.gate"):
        init_from_parts(*parts, **SETTINGS)
    siglip(parts[0], True)
    with pytest.raises(ValueError, match=r"missing: model\.language_model\.layers\.1\.mlp\.up_proj\.weight"):
        init_from_parts(*parts, **SETTINGS)


def test_a_head_beside_a_tied_embedding_must_equal_it(parts):
    siglip(parts[0], True)
    qwen2(parts[1], tied=True)
    edit(parts[1], lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    init_from_parts(*parts, **SETTINGS)
    edit(parts[1], lambda w: w["lm_head.weight"].add_(1))
    with pytest.raises(ValueError, match="ties lm_head and embed_tokens"):
        init_from_parts(*parts, **SETTINGS)


def test_wrong_sources_are_refused(parts):
    siglip(parts[0], True)
    qwen2(parts[1])
    with pytest.raises(ValueError, match="holds a qwen2 model, not a SigLIP"):
        init_from_parts(parts[1], parts[1], **SETTINGS)
    with pytest.raises(ValueError, match="holds a siglip model, not a Qwen2"):
        init_from_parts(parts[0], parts[0], **SETTINGS)


def test_a_checkpoint_loads_whole_or_not_at_all(tiny_model, tmp_path):
    model = tiny_model(tied=True)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, torch.float32)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert {p.dtype for p in load_model(tmp_path, torch.bfloat16).parameters()} == {torch.bfloat16}
    edit(tmp_path, lambda w: w.update({"extra": torch.zeros(1)}) or w.pop("model.projector.readout.2.bias"))
    with pytest.raises(
        ValueError, match=r"(?s)missing: model.projector.readout.2.bias.*no place in the model: extra"
    ):
        load_model(tmp_path, torch.float32)


def test_another_kind_of_model_is_refused_with_the_way_out(parts, tmp_path):
    qwen2(parts[1])
    with pytest.raises(
        ValueError, match=r"holds a qwen2 model, not a whole VideoLLaMA3 \(model_type video_llama_3"
    ):
        load_model(parts[1], torch.float32)
    with pytest.raises(ValueError, match=r"there is no config\.json"):
        load_model(tmp_path, torch.float32)


@pytest.mark.parametrize("tower", ["model.vision_encoder.", "model.vision_encoder.vision_encoder."])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_of_the_original_code_loads_with_equal_logits(tiny_model, mixed, tmp_path, tower, tied):
    model = tiny_model(tied=tied).eval()
    original = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("model.vision_model.", tower).replace("model.projector.", "model.mm_projector.")
        original[name.replace("model.language_model.", "model.")] = tensor.clone()
    if tied:
        del original["lm_head.weight"]
    converted = convert_original_keys(original)
    assert converted.keys() == model.state_dict().keys() - ({"lm_head.weight"} if tied else set())

    text, vision = model.config.text_config.to_dict(), model.config.vision_config.to_dict()
    described = {**text, "model_type": "videollama3_qwen2", "vision_encoder_config": vision}
    described.update(use_token_compression=True, rope_theta=10000.0)
    del described["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(described))
    save_file(original, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(tmp_path, torch.float32).eval()
    assert isinstance(loaded, VideoLlama3ForConditionalGeneration)
    assert (loaded.config.image_token_id, loaded.config.video_token_id) == (151655, 151656)
    loaded.config.image_token_id = loaded.model.config.image_token_id = 118
    loaded.config.video_token_id = loaded.model.config.video_token_id = 119
    found, expected = ({**one.state_dict(), **dict(one.named_buffers())} for one in (loaded, model))
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    with torch.no_grad():
        for conversation in mixed:
            inputs = conversation.stock_inputs()
            # Not to the bit: one sample is one token, and where MKL takes its SSE code (MKL_ENABLE_INSTRUCTIONS=AVX) a
            # product of one row is rounded by where the weight lies.
            torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)
