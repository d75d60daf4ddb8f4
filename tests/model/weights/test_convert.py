"""The original's layouts and transformers' form must become each other without the change of a byte."""

from __future__ import annotations

import copy
import json
import pickle
import re
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, VideoLlama3ForConditionalGeneration

from vl3train.cli.main import main
from vl3train.model.weights.convert import convert
from vl3train.model.weights.export import logits_of, probe
from vl3train.model.weights.hf_folder import load_trained, save_weights
from vl3train.model.weights.layouts import from_hf

AUTO_MAP = {"AutoConfig": "configuration_videollama3.Videollama3Qwen2Config"}


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return VideoLlama3ForConditionalGeneration.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def hf(model, processor, tmp_path_factory):
    return save_weights(model, processor, tmp_path_factory.mktemp("hf") / "hf")


@pytest.fixture(scope="module")
def like(tmp_path_factory):
    """What a release has beside weights and tokenizer."""
    folder = tmp_path_factory.mktemp("release")
    (folder / "config.json").write_text(json.dumps({"model_type": "videollama3_qwen2", "auto_map": AUTO_MAP}))
    (folder / "configuration_videollama3.py").write_text(
        "raise SystemExit('the code of a checkpoint was run')"
    )
    (folder / "chat_template.json").write_text("{}")
    (folder / "processor_config.json").write_text('{"image_merge_size": 2, "video_merge_size": 2}')
    (folder / "model.safetensors").write_bytes(b"not copied")
    return folder


@pytest.fixture(scope="module")
def released(hf, like, tmp_path_factory):
    out = tmp_path_factory.mktemp("released") / "released"
    convert(hf, out, to="released", like=like)
    return out


def weights_of(folder):
    return {name: one for file in folder.glob("model*.safetensors") for name, one in load_file(file).items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    return [
        name
        for name, one in expected.items()
        if one.dtype != found[name].dtype
        or not torch.equal(one.view(torch.int16), found[name].view(torch.int16))
    ] == []


def test_a_release_has_its_names_code_and_settings(released, like):
    config = json.loads((released / "config.json").read_text())
    assert (config["model_type"], config["auto_map"]) == ("videollama3_qwen2", AUTO_MAP)
    assert config["vision_encoder_config"]["hidden_size"] == 48
    names = weights_of(released).keys()
    assert {name.split(".")[1] for name in names} == {
        "vision_encoder",
        "mm_projector",
        "layers",
        "embed_tokens",
        "norm",
    }
    for name in ("configuration_videollama3.py", "chat_template.json", "processor_config.json"):
        assert (released / name).read_bytes() == (like / name).read_bytes()


@pytest.mark.parametrize("shard_bytes", [10**9, 60_000])
def test_hf_released_hf_is_equal_in_every_byte_and_in_its_logits(model, hf, released, tmp_path, shard_bytes):
    lines = []
    convert(released, tmp_path / "again", shard_bytes=shard_bytes, progress=lines.append)
    again = tmp_path / "again"
    assert same(weights_of(again), weights_of(hf))
    count = len(list(again.glob("model*.safetensors")))
    assert (count > 1) == (shard_bytes < 10**9)
    assert (again / "model.safetensors.index.json").exists() == (count > 1)
    assert len(lines) == count
    loaded, info = VideoLlama3ForConditionalGeneration.from_pretrained(
        again, dtype="auto", output_loading_info=True
    )
    assert not any(info.values())
    processor = AutoProcessor.from_pretrained(again)
    assert processor.image_processor.merge_size == 2
    assert torch.equal(logits_of(loaded, probe(processor)), logits_of(model, probe(processor)))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (hf, again)]
    for part in ("text_config", "vision_config"):
        assert configs[0][part] == configs[1][part]
    assert configs[0]["image_token_id"] == configs[1]["image_token_id"]


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_the_training_layout_becomes_hf(hf, tmp_path, form):
    convert(hf, tmp_path / "training", to="training")
    source = tmp_path / "training"
    weights = weights_of(source)
    assert "model.vision_encoder.vision_encoder.post_layernorm.bias" in weights
    if form == "bin":  # with the head that the original's own script writes too
        (source / "model.safetensors").unlink()
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        torch.save(weights, source / "pytorch_model.bin")
    made = convert(source, tmp_path / "again")
    assert made.found == "training"
    assert same(weights_of(tmp_path / "again"), weights_of(hf))


def test_a_projector_takes_the_place_of_that_of_its_base(released, hf, tmp_path):
    trained = {
        f"model.mm_projector.readout.{name}": torch.full_like(one, 0.5)
        for name, one in (
            (n[24:], one) for n, one in weights_of(hf).items() if n.startswith("model.projector")
        )
    }
    torch.save(trained, tmp_path / "mm_projector.bin")
    assert (
        main(["convert", str(tmp_path / "mm_projector.bin"), str(tmp_path / "out"), "--base", str(released)])
        == 0
    )
    for name, one in weights_of(tmp_path / "out").items():
        expected = torch.full_like(one, 0.5) if "projector" in name else weights_of(hf)[name]
        assert torch.equal(one, expected), name


def test_lora_of_the_original_names_its_base_and_means_the_same(model, hf, released, tmp_path):
    """Written as its training does: plain names of modules, the projector beside in non_lora_trainables.bin."""
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|down_proj)", lora_alpha=4)
    adapted = get_peft_model(copy.deepcopy(model).float(), config)
    torch.manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    adapted.base_model.model.model.projector.readout[0].bias.data += 0.5
    adapted.save_pretrained(tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    renamed = {name.replace("model.language_model.", "model."): one for name, one in load_file(file).items()}
    save_file(renamed, file)
    described = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    described["target_modules"] = ["q_proj", "down_proj"]
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(described))
    bias = adapted.base_model.model.model.projector.readout[0].bias.data.bfloat16()
    torch.save(
        {"base_model.model.model.mm_projector.readout.0.bias": bias},
        tmp_path / "lora" / "non_lora_trainables.bin",
    )

    assert main(["convert", str(tmp_path / "lora"), str(tmp_path / "out"), "--base", str(released)]) == 0
    base = VideoLlama3ForConditionalGeneration.from_pretrained(tmp_path / "out" / "base", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    named = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "out" / "base")
    inputs = probe(AutoProcessor.from_pretrained(hf))
    expected = logits_of(adapted, inputs)
    torch.testing.assert_close(logits_of(loaded, inputs), expected, rtol=1e-3, atol=1e-3)
    asked, _ = load_trained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits_of(asked, inputs), expected, rtol=1e-3, atol=1e-3)


class Harmful:
    def __reduce__(self):
        return (print, ("code of a checkpoint was run",))


def test_no_code_in_a_pickle_is_run(hf, tmp_path, capsys):
    convert(hf, tmp_path / "training", to="training")
    weights = weights_of(tmp_path / "training")
    (tmp_path / "training" / "model.safetensors").unlink()
    torch.save(
        {**weights, "more": Harmful()}, tmp_path / "training" / "pytorch_model.bin", pickle_module=pickle
    )
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "training"), str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert "code of a checkpoint was run" not in printed.out
    assert "pytorch_model.bin holds more than weights" in printed.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "released"], "name one with --like FOLDER"),
        (["--base", "elsewhere"], "is a whole model; leave --base out"),
    ],
)
def test_a_call_that_cannot_be_done_says_what_it_needs(hf, tmp_path, capsys, words, message):
    assert main(["convert", str(hf), str(tmp_path / "out"), *words]) == 1
    assert message in capsys.readouterr().err


def test_a_weight_that_is_missing_is_named(hf, released, tmp_path, capsys):
    shutil.copytree(released, tmp_path / "damaged")
    weights = weights_of(released)
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})
    assert main(["convert", str(tmp_path / "damaged"), str(tmp_path / "out")]) == 1
    assert re.search("1 weights are missing: model.language_model.norm.weight", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_names_of_the_training_have_one_more_prefix():
    assert from_hf("model.vision_model.a", "released") == "model.vision_encoder.a"
    assert from_hf("model.language_model.norm.weight", "training") == "model.norm.weight"
    assert from_hf("lm_head.weight", "released") == "lm_head.weight"
