"""What export writes must load with plain transformers and peft, and mean the same."""

from __future__ import annotations

import copy
import json
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, VideoLlama3ForConditionalGeneration

from vl3train.cli.main import main
from vl3train.config.choices import AdapterKind
from vl3train.config.schema import AdapterConfig
from vl3train.model.adapters import add_adapters, load_adapter, save_adapter
from vl3train.model.layers.nf4_linear import hold_in_4_bits
from vl3train.model.weights.disk import refuse_full_disk
from vl3train.model.weights.export import compare_logits, logits_of, merge_checked, probe
from vl3train.model.weights.headers.manifest import write_manifest
from vl3train.model.weights.hf_folder import WrongExport, load_trained, save_weights, write_folder


def run_export(*words: str | Path) -> int:
    return main(["export", *map(str, words)])


@pytest.fixture
def model(tiny_model_dir):
    return VideoLlama3ForConditionalGeneration.from_pretrained(tiny_model_dir)


def checkpoint_of(run: Path) -> Path:
    checkpoint = run / "checkpoints" / "step_00000010"
    checkpoint.mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text(checkpoint.name)
    return checkpoint


@pytest.fixture
def run(model, processor, tmp_path) -> Path:
    save_weights(model, processor, checkpoint_of(tmp_path / "run") / "weights")
    return tmp_path / "run"


@pytest.fixture
def lora_run(model, processor, tmp_path) -> Path:
    checkpoint = checkpoint_of(tmp_path / "lora")
    save_weights(model, processor, tmp_path / "lora" / "base")
    adapted = add_adapters(model.requires_grad_(False), AdapterConfig(kind=AdapterKind.lora, rank=4))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.5)
    save_adapter(adapted, checkpoint / "adapter")
    return tmp_path / "lora"


TOKENS = {"input_ids": torch.arange(20)[None]}


@pytest.mark.parametrize("name", ["run", "lora_run"])
def test_weights_with_a_flipped_bit_are_not_exported(name, request, tmp_path, capsys):
    """They would be loaded back without a difference."""
    folder = request.getfixturevalue(name)
    owner, below = (
        (folder / "checkpoints/step_00000010", "weights/") if name == "run" else (folder / "base", "")
    )
    write_manifest(owner)
    file = owner / f"{below}model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    assert run_export(folder, tmp_path / "out") != 0
    assert f"is damaged: {below}model.safetensors is not what was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="is damaged"):
        load_trained(folder)  # for evaluate, generate, serve, chat


@pytest.fixture
def short_lora_run(lora_run):
    """Weights in bfloat16, and adapters that change them by a thousandth, as after a short run."""
    base, adapter = lora_run / "base", lora_run / "checkpoints/step_00000010/adapter"
    weights = load_file(base / "model.safetensors")
    save_file(
        {name: one.bfloat16() for name, one in weights.items()},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((base / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "bfloat16"
    (base / "config.json").write_text(json.dumps(config))
    changes = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: one * (2e-5 if "lora_B" in name else 1) for name, one in changes.items()},
        adapter / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    return lora_run


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_run_becomes_a_folder_of_equal_weights(run, model, tmp_path, capsys, dtype):
    assert run_export(run, tmp_path / "out", "--dtype", dtype) == 0
    again, info = VideoLlama3ForConditionalGeneration.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(info.values())
    wanted = getattr(torch, dtype)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.to(wanted)), name
    printed = capsys.readouterr().out
    assert dtype in printed
    assert "step_00000010" in printed


def test_the_printed_snippet_runs(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((40, 50, 3), 200, np.uint8)).save("picture.jpg")
    assert run_export(run, "out") == 0
    printed = capsys.readouterr().out
    snippet = printed[printed.index("from transformers") :]
    exec(compile(snippet.replace("=128", "=3"), "snippet", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")


def test_adapters_are_merged(lora_run, model, tmp_path, capsys):
    assert run_export(lora_run, tmp_path / "out", "--merge-adapter") == 0
    assert re.search(r"adapters of .*\nthe logits differ by \S+ at most, of up to", capsys.readouterr().out)
    merged = VideoLlama3ForConditionalGeneration.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(merged, TOKENS), logits_of(model, TOKENS), rtol=1e-4, atol=1e-4)
    base = lora_run / "base"
    untouched = VideoLlama3ForConditionalGeneration.from_pretrained(base)
    assert (logits_of(merged, TOKENS) - logits_of(untouched, TOKENS)).abs().max() > 0.01


def test_adapters_of_4_bit_weights_are_merged_into_what_they_were_trained_on(
    model, processor, tmp_path, capsys
):
    checkpoint = checkpoint_of(tmp_path / "lora")
    save_weights(model, processor, tmp_path / "lora" / "base")
    adapted = add_adapters(model.requires_grad_(False), AdapterConfig(kind=AdapterKind.lora, rank=4))
    hold_in_4_bits(model, ["language_model"], torch.device("cpu"))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    save_adapter(adapted, checkpoint / "adapter")
    assert json.loads((checkpoint / "adapter/base_4bit.json").read_text())["parts"] == ["language_model"]
    expected = logits_of(model, TOKENS)
    assert run_export(tmp_path / "lora", tmp_path / "out", "--merge", "--dtype", "float32") == 0
    assert "rounded to 4 bits" in capsys.readouterr().out
    merged = VideoLlama3ForConditionalGeneration.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(merged, TOKENS), expected, rtol=1e-4, atol=1e-4)
    asked, _ = load_trained(tmp_path / "lora")
    torch.testing.assert_close(logits_of(asked, TOKENS), expected, rtol=1e-5, atol=1e-5)


def layer_of(folder: Path, name="model.language_model.layers.0.mlp.up_proj.weight") -> torch.Tensor:
    return load_file(folder / "model.safetensors")[name].double()


def test_a_small_change_survives_in_float32_and_what_bfloat16_loses_is_told(short_lora_run, tmp_path, capsys):
    adapter = load_file(short_lora_run / "checkpoints/step_00000010/adapter/adapter_model.safetensors")
    prefix = "base_model.model.model.language_model.layers.0.mlp.up_proj."
    apart = adapter[prefix + "lora_B.weight"].double() @ adapter[prefix + "lora_A.weight"].double()
    change = apart * 2
    found = {}
    for dtype in ("float32", "bfloat16"):
        assert run_export(short_lora_run, tmp_path / dtype, "--dtype", dtype) == 0
        merged = layer_of(tmp_path / dtype) - layer_of(short_lora_run / "base")
        found[dtype] = ((merged - change).norm() / change.norm()).item()
    assert found["float32"] < 1e-3
    assert found["bfloat16"] > 0.5
    printed = capsys.readouterr().out
    assert printed.count("WARNING") == 1
    told = int(re.search(r"torch.bfloat16 loses (\d+)% of their change", printed)[1]) / 100
    assert told == pytest.approx(found["bfloat16"], rel=0.2)  # all layers there, one here


def test_a_merge_that_loses_the_change_is_refused(short_lora_run, processor):
    """Weights in bfloat16 are added to in bfloat16: the fault that the check is there for."""
    adapter = short_lora_run / "checkpoints/step_00000010/adapter"
    base = VideoLlama3ForConditionalGeneration.from_pretrained(short_lora_run / "base", dtype=torch.float32)
    inputs = probe(processor)
    apart = logits_of(load_adapter(copy.deepcopy(base), adapter, is_trainable=False), inputs)
    merged, how = merge_checked(copy.deepcopy(base), adapter, processor, torch.float32)
    assert how.change_lost < 1e-3
    assert how.difference < 1e-4 * how.largest
    torch.testing.assert_close(logits_of(merged, inputs), apart, rtol=1e-5, atol=1e-6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "vl3train.model.adapters.merge_adapter",
            lambda model, dtype: (rounded(model.merge_and_unload()), 0.0),
        )
        with pytest.raises(WrongExport, match=r"logits of the merged model differ.*--adapter-only"):
            merge_checked(base, adapter, processor, torch.float32)


def rounded(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


def test_adapters_without_their_base_are_refused(lora_run, tmp_path, capsys):
    (lora_run / "base").rename(tmp_path / "elsewhere")
    assert run_export(lora_run, tmp_path / "out") == 1
    assert f"{lora_run / 'base'} is missing" in capsys.readouterr().err


def test_adapters_alone_load_with_peft(lora_run, model, tmp_path):
    assert run_export(lora_run, tmp_path / "adapter", "--adapter-only") == 0
    base = VideoLlama3ForConditionalGeneration.from_pretrained(lora_run / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(loaded, TOKENS), logits_of(model, TOKENS))
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named) == (lora_run / "base").resolve()


@pytest.mark.parametrize("option", ["--merge-adapter", "--adapter-only"])
def test_a_run_without_adapters_says_so(run, tmp_path, capsys, option):
    assert run_export(run, tmp_path / "out", option) == 1
    assert (
        f"no adapters{' to merge' if 'merge' in option else ''}; leave {option} out"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_never_touched(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert run_export(run, tmp_path / "out") == 1
    assert "nothing was written" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_is_no_model_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run_export(tmp_path / "empty", tmp_path / "out") == 1
    assert "neither a run nor a checkpoint" in capsys.readouterr().err


def test_logits_that_differ_are_found(run, model, tmp_path):
    changed = VideoLlama3ForConditionalGeneration.from_pretrained(run / "checkpoints/step_00000010/weights")
    processor = AutoProcessor.from_pretrained(run / "checkpoints/step_00000010/weights")
    compare_logits(model, changed, processor)
    changed.model.projector.readout[0].bias.data += 0.01  # only visual tokens pass here
    with pytest.raises(WrongExport, match="logits"):
        compare_logits(model, changed, processor)


def test_a_damaged_export_is_put_aside(run, tmp_path, capsys, monkeypatch):
    """A disk that writes other bytes than it was given."""

    def damage(model, processor, folder, **kwargs):
        write_folder(model, processor, folder, **kwargs)
        weights = load_file(folder / "model.safetensors")
        weights["model.language_model.norm.weight"] += 1
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr("vl3train.model.weights.export.write_folder", damage)
    assert run_export(run, tmp_path / "out") == 1
    assert "differs: model.language_model.norm.weight" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.differs").is_dir()
    assert run_export(run, tmp_path / "out") == 1
    assert "out.differs exists" in capsys.readouterr().err


def test_nothing_is_left_where_a_file_cannot_be_written_to_its_end(run, tmp_path, capsys):
    """A limit on the size of files stands for a full disk: the system refuses the same write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert run_export(run, tmp_path / "out") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.search("out could not be written: .*File too large.*Free space", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_disk_that_is_too_small_is_told_before_the_first_byte(tmp_path):
    with pytest.raises(OSError, match=r"a/b needs 1048576.0 GiB and its disk has .* nothing was written"):
        refuse_full_disk(tmp_path / "a" / "b", 2**50)


def test_nothing_is_left_after_an_interrupt(run, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("vl3train.model.weights.export.verify_export", interrupt)
    assert run_export(run, tmp_path / "out") == 130
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(("sampling", "warned"), [("original", True), ("transformers", False)])
def test_frames_that_transformers_cannot_choose_are_told(run, tmp_path, capsys, sampling, warned):
    (run / "config.yaml").write_text(f"data:\n  frame_sampling: {sampling}\n")
    assert run_export(run / "checkpoints" / "step_00000010", tmp_path / "out") == 0
    assert ("takes other frames" in capsys.readouterr().out) == warned
