"""A Llama must compute the same as a Qwen2; what a Qwen2 cannot hold is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2ForCausalLM

from vl3train.cli.main import main
from vl3train.demo.llama import as_qwen2, compare
from vl3train.demo.parts import PartSizes
from vl3train.demo.tokenizer import train_tokenizer
from vl3train.model.weights.from_parts import init_from_parts
from vl3train.model.weights.processor import prepare_tokenizer

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 265,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "rms_norm_eps": 1e-4,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["a red circle, left"], folder, 262)
    return folder


def stored(model: LlamaForCausalLM, tokenizer_folder: Path, folder: Path) -> Path:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"rope_parameters": LLAMA3_ROPE},
        {"num_key_value_heads": 6, "vocab_size": 320},
    ],
    ids=["tied", "own head", "stretched positions", "a head of keys for each of queries"],
)
def test_the_logits_are_those_of_the_llama(changes):
    model = llama(**changes)
    qwen2 = as_qwen2(model, num_tokens=300)
    assert qwen2.config.vocab_size == 320
    ids = torch.randint(0, 265, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = model(input_ids=ids).logits, qwen2(input_ids=ids).logits
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, rtol=0, atol=1e-5)
    assert float(expected.std()) > 0.5, "the random weights say something"
    if model.config.vocab_size < 320:
        assert (found[..., 265:].amax(-1) < expected.amax(-1)).all(), "a new token is the likeliest nowhere"


def test_stage_1_takes_the_parts(tokenizer_folder: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("vl3train.demo.parts.SMALL_ENCODER", PartSizes(vision_hidden=64, vision_layers=1))
    source = stored(llama().to(torch.bfloat16), tokenizer_folder, tmp_path / "llama")
    out = tmp_path / "parts"
    assert main(["parts", str(source), str(out)]) == 0
    assert "with the logits of" in capsys.readouterr().out
    tokenizer = prepare_tokenizer(out / "language_model")
    ids = (tokenizer.convert_tokens_to_ids("<|image_pad|>"), tokenizer.convert_tokens_to_ids("<|video_pad|>"))
    model = init_from_parts(
        str(out / "vision_encoder"),
        str(out / "language_model"),
        image_token_id=ids[0],
        video_token_id=ids[1],
        initializer_range=0.02,
        seed=0,
        dtype=torch.bfloat16,
    )
    assert model.config.text_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    embedding = model.model.language_model.embed_tokens.weight
    expected = LlamaForCausalLM.from_pretrained(source).model.embed_tokens.weight
    assert len(embedding) == 320
    assert torch.equal(embedding[:265], expected)
    text = "How  many 12 <|im_end|>\nGröße"
    assert tokenizer(text).input_ids == AutoTokenizer.from_pretrained(source)(text).input_ids
    assert main(["parts", str(source), str(out)]) == 1
    assert "parts exists; nothing was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention_bias": True}, ["attention_bias"]),
        ({"mlp_bias": True, "hidden_act": "gelu"}, ["mlp_bias", "hidden_act"]),
        ({"head_dim": 16}, ["6 heads of 16", "hidden_size=48"]),
    ],
    ids=["a bias behind attention", "two things", "wide heads"],
)
def test_what_a_qwen2_cannot_hold_is_refused(changes, said, tokenizer_folder, tmp_path, capsys):
    source = stored(llama(**changes), tokenizer_folder, tmp_path / "llama")
    assert main(["parts", str(source), str(tmp_path / "parts")]) == 1
    told = capsys.readouterr().err
    assert all(word in told for word in [*said, "take a Llama without it"])
    assert not (tmp_path / "parts").exists()


def test_other_models_and_missing_files_are_named(tokenizer_folder, tmp_path, capsys):
    qwen2 = as_qwen2(llama(), num_tokens=300)
    qwen2.save_pretrained(tmp_path / "qwen2")
    assert main(["parts", str(tmp_path / "qwen2"), str(tmp_path / "parts")]) == 1
    assert "it is a Qwen2 already; name it in model.language_model_from" in capsys.readouterr().err
    assert main(["parts", str(tmp_path / "no.gguf"), str(tmp_path / "parts")]) == 1
    assert "there is no file" in capsys.readouterr().err
    for name, content in (
        ("no model", None),
        ("cut", '{"model_type": "llama", '),
        ("no weights", '{"model_type": "llama"}'),
    ):
        folder = tmp_path / name
        folder.mkdir()
        if content is not None:
            (folder / "config.json").write_text(content)
        assert main(["parts", str(folder), str(tmp_path / "parts")]) == 1
        said = capsys.readouterr().err
        assert f"{folder} cannot be read as a language model (" in said
        assert "SOURCE is a folder with config.json" in said
    assert not (tmp_path / "parts").exists()


def test_a_wrong_mapping_is_seen(tokenizer_folder: Path, tmp_path: Path):
    model, tokenizer = llama(), AutoTokenizer.from_pretrained(tokenizer_folder)
    qwen2: Qwen2ForCausalLM = as_qwen2(model, num_tokens=300)
    with torch.no_grad():
        qwen2.model.layers[1].self_attn.v_proj.bias.fill_(0.01)
    qwen2.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="other logits than the source"):
        compare(model, tokenizer, tmp_path)
