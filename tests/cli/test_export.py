"""What export writes must load with plain transformers and peft, and mean the same."""

from __future__ import annotations

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
from vl3train.model.adapters import add_adapters, save_adapter
from vl3train.model.weights.export import compare_logits
from vl3train.model.weights.hf_folder import WrongExport, save_weights


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


def logits_of(model) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(20)[None]).logits


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
    assert "adapters of" in capsys.readouterr().out
    merged = VideoLlama3ForConditionalGeneration.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(merged), logits_of(model), rtol=1e-4, atol=1e-4)
    base = lora_run / "base"
    untouched = VideoLlama3ForConditionalGeneration.from_pretrained(base)
    assert (logits_of(merged) - logits_of(untouched)).abs().max() > 0.01


def test_adapters_without_their_base_are_refused(lora_run, tmp_path, capsys):
    (lora_run / "base").rename(tmp_path / "elsewhere")
    assert run_export(lora_run, tmp_path / "out") == 1
    assert f"{lora_run / 'base'} is missing" in capsys.readouterr().err


def test_adapters_alone_load_with_peft(lora_run, model, tmp_path):
    assert run_export(lora_run, tmp_path / "adapter", "--adapter-only") == 0
    base = VideoLlama3ForConditionalGeneration.from_pretrained(lora_run / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(loaded), logits_of(model))
    assert not (tmp_path / "adapter" / "model.safetensors").exists()


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
    written = save_weights

    def damage(*args, **kwargs):
        folder = written(*args, **kwargs)
        weights = load_file(folder / "model.safetensors")
        weights["model.language_model.norm.weight"] += 1
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr("vl3train.model.weights.export.save_weights", damage)
    assert run_export(run, tmp_path / "out") == 1
    assert "differs: model.language_model.norm.weight" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.differs").is_dir()
