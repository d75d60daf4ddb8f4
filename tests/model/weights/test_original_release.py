"""A start from the original's released folder reads its weights, config and tokenizer, and runs none of its code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from vl3train.contracts.tokens import CHAT_TEMPLATE
from vl3train.model.weights.from_parts import load_model
from vl3train.model.weights.headers.folder import Kind, inspect_folder
from vl3train.model.weights.processor import build_processor, prepare_tokenizer

CODE = """
from pathlib import Path
Path({mark!r}).touch()
class Videollama3Qwen2Config: pass
class Videollama3Qwen2ForCausalLM: pass
class Videollama3Qwen2Tokenizer: pass
"""


@pytest.fixture
def released(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model in the layout of DAMO-NLP-SG/VideoLLaMA3-2B, with code that leaves a mark when it runs."""
    folder = tmp_path / "released"
    folder.mkdir()
    config = json.loads((tiny_model_dir / "config.json").read_text())
    text = {key: value for key, value in config["text_config"].items() if key != "rope_parameters"}
    described = {
        **text,
        "model_type": "videollama3_qwen2",
        "architectures": ["Videollama3Qwen2ForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_videollama3.Videollama3Qwen2Config",
            "AutoModelForCausalLM": "modeling_videollama3.Videollama3Qwen2ForCausalLM",
        },
        "image_token_index": 151665,
        "mm_projector_type": "mlp2x_gelu",
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "use_token_compression": True,
        "vision_encoder_config": {**config["vision_config"], "model_type": "videollama3_vision_encoder"},
    }
    (folder / "config.json").write_text(json.dumps(described))
    weights = {}
    for name, tensor in load_file(tiny_model_dir / "model.safetensors").items():
        for ours, original in (
            ("model.vision_model.", "model.vision_encoder."),
            ("model.projector.", "model.mm_projector."),
            ("model.language_model.", "model."),
        ):
            name = name.replace(ours, original)
        weights[name] = tensor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        if (tiny_model_dir / name).is_file():
            shutil.copy(tiny_model_dir / name, folder)
    tokenizer = json.loads((tiny_model_dir / "tokenizer_config.json").read_text())
    tokenizer |= {"processor_class": "Videollama3Qwen2Processor", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    auto = {"auto_map": {"AutoProcessor": "modeling_videollama3.Videollama3Qwen2Processor"}}
    (folder / "processor_config.json").write_text(json.dumps(auto))
    (folder / "modeling_videollama3.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    return folder


@pytest.mark.parametrize("own_tokenizer_code", [False, True])
def test_no_code_is_run_and_nobody_is_asked(
    released: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own_tokenizer_code: bool,
):
    if own_tokenizer_code:
        file = released / "tokenizer_config.json"
        auto_map = {"AutoTokenizer": [None, "modeling_videollama3.Videollama3Qwen2Tokenizer"]}
        file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": auto_map}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks whether to run custom code"))
    assert inspect_folder(released, Kind.whole).faults == []
    ours = prepare_tokenizer(tiny_model_dir)
    assert prepare_tokenizer(released).get_vocab() == ours.get_vocab()
    build_processor(released).save_pretrained(tmp_path / "processor")
    written = AutoProcessor.from_pretrained(tmp_path / "processor")
    assert written.chat_template == written.tokenizer.chat_template == CHAT_TEMPLATE
    for file in (tmp_path / "processor").glob("*.json"):
        assert "modeling_videollama3" not in file.read_text()
        assert "Videollama3Qwen2" not in file.read_text()
    model = load_model(released, torch.float32)
    assert model.config.image_token_id == ours.convert_tokens_to_ids("<|image_pad|>")
    assert model.config.video_token_id == ours.convert_tokens_to_ids("<|video_pad|>")
    expected = load_file(tiny_model_dir / "model.safetensors")
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not (tmp_path / "ran").exists()


def test_the_layout_of_the_original_training_is_read_too(released: Path, tiny_model_dir: Path):
    """A pytorch_model.bin with the encoder one level deeper. Its config names an encoder of the published sizes."""
    file = released / "model.safetensors"
    weights = load_file(file)
    deeper = {
        name.replace("vision_encoder.", "vision_encoder.vision_encoder."): t for name, t in weights.items()
    }
    torch.save(deeper, released / "pytorch_model.bin")
    file.unlink()
    loaded = load_model(released, torch.float32).state_dict()
    expected = load_file(tiny_model_dir / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    config = json.loads((released / "config.json").read_text())
    del config["vision_encoder_config"]
    (released / "config.json").write_text(
        json.dumps({**config, "vision_encoder": "DAMO-NLP-SG/SigLIP-NaViT"})
    )
    with pytest.raises(
        ValueError, match=r"patch_embedding.bias is \[48\] in pytorch_model.bin, \[1152\] by config"
    ):
        load_model(released, torch.float32)
