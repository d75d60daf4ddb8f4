"""A processor and a folder of weights must mean the same after a round trip through plain transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, VideoLlama3ForConditionalGeneration

from vl3train.config.data_options import DataConfig
from vl3train.contracts.tokens import CHAT_TEMPLATE, IMAGE_PAD, UPSTREAM_ADDED_TOKENS, VIDEO_PAD
from vl3train.model.weights.from_parts import load_model
from vl3train.model.weights.hf_folder import WrongExport, locate_trained, save_weights, verify_export
from vl3train.model.weights.processor import build_processor, trained_fps


def test_budgets_are_the_published_ones(processor):
    assert processor.image_processor.size["shortest_edge"] == 3136
    assert processor.video_processor.size["shortest_edge"] == 12544
    # min(16 384 patches, 10 240 tokens) and min(16 384 tokens, 10 240 tokens), in pixels
    assert processor.image_processor.size["longest_edge"] == 10240 * 14**2
    assert processor.video_processor.size["longest_edge"] == 10240 * 28**2
    assert processor.video_processor.max_frames == 180


def test_a_smaller_limit_of_either_kind_wins(tokenizer_dir):
    data = DataConfig(image_max_pixels=50_000, video_max_pixels=10**9, max_visual_tokens=300, fps=2.0)
    processor = build_processor(tokenizer_dir, data=data, image_merge_size=2, prune_frames=False)
    assert processor.image_processor.size["longest_edge"] == 50_000
    assert processor.video_processor.size["longest_edge"] == 300 * 28**2
    assert processor.image_processor.merge_size == 2
    assert trained_fps(processor) == 2.0
    assert processor.video_processor.use_token_compression is False


def test_tokens_come_in_the_original_order(processor):
    ids = processor.tokenizer.convert_tokens_to_ids(list(UPSTREAM_ADDED_TOKENS))
    assert ids == list(range(ids[0], ids[0] + 3))
    for token in (IMAGE_PAD, VIDEO_PAD, *UPSTREAM_ADDED_TOKENS):
        assert len(processor.tokenizer(token)["input_ids"]) == 1


def test_a_tokenizer_of_another_family_is_refused(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"im_start.*take a Qwen2"):
        build_processor(tmp_path)


def test_the_processor_survives_a_round_trip(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    recompute = AutoProcessor.from_pretrained(tmp_path)
    assert recompute.chat_template == CHAT_TEMPLATE
    assert recompute.tokenizer.padding_side == "left"
    assert recompute.tokenizer.eos_token == "<|im_end|>"
    assert recompute.image_processor.max_visual_tokens == 10240
    image = np.random.default_rng(0).integers(0, 255, (61, 83, 3), dtype=np.uint8)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]
    texts = [p.apply_chat_template(messages, add_generation_prompt=True) for p in (processor, recompute)]
    assert (
        texts[0] == texts[1] == f"<|im_start|>user\n{IMAGE_PAD}\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    )
    one, two = (
        p(text=[text], images=[image], return_tensors="pt")
        for p, text in zip((processor, recompute), texts, strict=True)
    )
    assert set(one) == set(two)
    for name in one:
        assert torch.equal(torch.as_tensor(one[name]), torch.as_tensor(two[name])), name


def test_a_user_who_passes_fps_gets_sampled_frames_and_times(processor):
    clip = torch.randint(0, 255, (50, 3, 56, 84), dtype=torch.uint8)
    metadata = [{"fps": 25.0, "total_num_frames": 50}]
    inputs = processor(text=[VIDEO_PAD], videos=[clip], video_metadata=metadata, fps=2, do_sample_frames=True)
    text = processor.tokenizer.decode(inputs["input_ids"][0]).replace(VIDEO_PAD, "")
    assert text == "Time 0.0s:,Time 0.5s:,Time 1.0s:,Time 1.5s:"


@pytest.fixture
def model(tiny_model_dir):
    return VideoLlama3ForConditionalGeneration.from_pretrained(tiny_model_dir)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_written_weights_load_with_every_key_equal(model, processor, tmp_path, dtype):
    folder = save_weights(model, processor, tmp_path / "export", dtype=dtype)
    loaded = verify_export(folder, model.state_dict())
    assert loaded.dtype == (dtype or torch.float32)
    assert loaded.config.text_config.use_cache is True
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    assert loaded.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert json.loads((folder / "config.json").read_text())["architectures"] == [
        "VideoLlama3ForConditionalGeneration"
    ]
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")  # tied
    assert list(tmp_path.iterdir()) == [folder]


def test_a_state_dict_replaces_the_models_own_weights(model, processor, tmp_path):
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    folder = save_weights(model, processor, tmp_path / "export", state_dict=state)
    verify_export(folder, state)
    with pytest.raises(WrongExport, match=r"67 problems.*\n  differs: model"):
        verify_export(folder, model.state_dict())


def test_an_existing_folder_is_never_touched(model, processor, tmp_path):
    (tmp_path / "export").mkdir()
    with pytest.raises(FileExistsError, match="nothing was written"):
        save_weights(model, processor, tmp_path / "export")
    assert list((tmp_path / "export").iterdir()) == []


def test_a_lost_and_a_foreign_key_are_named(model, processor, tmp_path):
    folder = save_weights(model, processor, tmp_path / "export")
    weights = load_file(folder / "model.safetensors")
    lost = "model.projector.readout.0.bias"
    weights["model.stranger"] = weights.pop(lost)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WrongExport) as error:
        verify_export(Path(folder), model.state_dict())
    assert f"missing keys: {lost}" in str(error.value)
    assert "unexpected keys: model.stranger" in str(error.value)


def test_a_checkpoint_in_the_original_form_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "videollama3_qwen2"}')
    with pytest.raises(ValueError, match="holds a videollama3_qwen2 model; a stage can start from it"):
        locate_trained(tmp_path)


@pytest.mark.parametrize("read", [locate_trained, lambda folder: load_model(folder, torch.float32)])
def test_a_file_that_was_cut_off_is_named_with_the_way_out(model, processor, tmp_path, read):
    file = Path(save_weights(model, processor, tmp_path / "export")) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"(?s)damaged weights:.*model\.safetensors .*older checkpoint of the run"
    ):
        read(file.parent)
