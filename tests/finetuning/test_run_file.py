"""run.yaml says what the command says, and a person's changes are never lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vl3train.config.load import read_config
from vl3train.config.rules import adapter_rates, full_rates
from vl3train.config.schema import ModelConfig, RunConfig, TrainConfig
from vl3train.contracts.shapes import ENCODER, LANGUAGE_MODELS
from vl3train.finetuning.plan import samples_a_step, save_options
from vl3train.finetuning.run_file import is_as_written, run_text, with_overrides, write_run_file
from vl3train.finetuning.start_model import StartModel, costs_of, download, processor_options, size_of
from vl3train.finetuning.wish import Wish, output_folder, run_options, said, shown_options, wish_problems
from vl3train.model.adapter_targets import alpha_of

WISH = Wish(records=("my.jsonl",), model="model", out="out")
START = StartModel(folder=Path("/model"), size="2b", options={}, sizes=None)


TWO = {"projector": 2e-4, "language_model": 2e-4}


def read(wish: Wish, tmp_path: Path, *overrides: str):
    """The config of the run.yaml that the flow writes, whose rates are those of the words."""
    options = run_options(wish, START, on_gpu=False)
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(options))
    typed, found = read_config(overrides, config_file=tmp_path / "first.yaml")
    assert found == []
    assert typed is not None
    options = shown_options(with_overrides(options, overrides), typed)
    (tmp_path / "run.yaml").write_text(run_text(options, said(wish), tmp_path))
    cfg, found = read_config([], config_file=tmp_path / "run.yaml")
    assert found == []
    assert cfg is not None
    assert (full_rates(cfg), adapter_rates(cfg)) == (full_rates(typed), adapter_rates(typed))
    return cfg


def test_the_file_is_the_command(tmp_path: Path):
    cfg = read(WISH, tmp_path, "step.max_tokens=512", "run.num_epochs=7", "machine.attention=reference")
    assert (cfg.step.max_tokens, cfg.run.num_epochs, cfg.machine.attention.value) == (512, 7, "reference")
    assert (cfg.adapter.kind.value, adapter_rates(cfg)) == ("lora", {"language_model": 1e-4})
    assert alpha_of(cfg.adapter, "language_model") == 2 * cfg.adapter.rank
    assert cfg.finetune.held_out == "5%"
    nested = {
        "stage": "finetuning",
        "model": "2b",
        "adapter": "lora",
        "run": {"output_dir": "x", "num_epochs": 2},
    }
    (tmp_path / "nested.yaml").write_text(yaml.safe_dump(nested))
    again, found = read_config([], config_file=tmp_path / "nested.yaml")
    assert found == []
    assert again is not None
    assert again.run.num_epochs == 2


@pytest.mark.parametrize(
    ("settings", "overrides", "rates"),
    [
        ({}, (), {"language_model": 1e-4}),
        ({"rate": 3e-4}, (), {"language_model": 3e-4}),
        ({"full": True}, (), {"vision_encoder": 2e-6, "projector": 1e-5, "language_model": 1e-5}),
        ({"full": True, "rate": 3e-5, "parts": ("projector",)}, (), {"projector": 3e-5}),
        (
            {"parts": ("projector", "language_model")},
            ("optim.learning_rate=2e-4",),
            {"projector": 2e-4, "language_model": 2e-4},
        ),
        (
            {"full": True},
            ("~stage.learning_rates.projector",),
            {"vision_encoder": 2e-6, "language_model": 1e-5},
        ),
        (
            {"full": True},
            ("stage.learning_rates.vision_encoder=0",),
            {"projector": 1e-5, "language_model": 1e-5},
        ),
        ({"parts": ("projector", "language_model")}, (), {"projector": 1e-5, "language_model": 1e-4}),
        ({}, ("optim.learning_rate=2e-4",), {"language_model": 2e-4}),
    ],
)
def test_the_rates_are_those_that_were_asked_for(settings, overrides, rates, tmp_path: Path):
    wish = Wish(records=("a.jsonl",), model="m", out=str(tmp_path), **settings)
    cfg = read(wish, tmp_path, *overrides)
    assert {**full_rates(cfg), **adapter_rates(cfg)} == rates


def test_qlora_holds_the_base_in_four_bits(tmp_path: Path):
    wish = Wish(records=("a.jsonl",), model="m", out=str(tmp_path), qlora=True)
    assert read(wish, tmp_path).adapter.base_4bit.value == "nf4"
    assert said(wish)[-1] == "--qlora"


def test_a_file_that_a_person_changed_is_not_replaced(tmp_path: Path):
    first, second = ({"stage": "finetuning", "run.num_epochs": epochs} for epochs in (3.0, 4.0))
    write_run_file(tmp_path, run_text(first, ["a.jsonl"], tmp_path), has_begun=False)
    write_run_file(tmp_path, run_text(second, ["a.jsonl"], tmp_path), has_begun=False)
    file = tmp_path / "run.yaml"
    assert yaml.safe_load(file.read_text())["run.num_epochs"] == 4
    with pytest.raises(
        ValueError, match=r"has begun(?s:.*)run.num_epochs: 4.0 in the file, 3.0 in the command"
    ):
        write_run_file(tmp_path, run_text(first, ["a.jsonl"], tmp_path), has_begun=True)
    file.write_text(file.read_text().replace("num_epochs: 4.0", "num_epochs: 5"))
    assert not is_as_written(file.read_text())
    with pytest.raises(ValueError, match=r"was changed(?s:.*)vl3train finetune --config"):
        write_run_file(tmp_path, run_text(second, ["a.jsonl"], tmp_path), has_begun=False)
    assert "num_epochs: 5" in file.read_text()


def test_words_are_told_as_they_were_said():
    wish = Wish(
        records=("a b.jsonl",), model="m", parts=("x",), epochs=2, rate=1e-4, overrides=("run.seed=1",)
    )
    words = ["a b.jsonl", "--model", "m", "--epochs", "2", "--lr", "0.0001", "--parts", "x", "run.seed=1"]
    assert said(wish) == words
    assert output_folder(wish).parts[-2:] == ("runs", "a b")
    [problem] = wish_problems(wish)
    assert str(problem).startswith("--parts=x: the model has no such part; parts are vision_encoder")


@pytest.mark.parametrize(("samples", "ranks"), [(10, 1), (259, 1), (259, 8), (5000, 1), (5000, 64)])
def test_a_small_set_gets_a_hundred_steps_where_ranks_allow_it(samples: int, ranks: int):
    at_most = samples_a_step(samples, 3, ranks)
    assert at_most >= ranks
    assert samples * 3 / at_most >= 100 or at_most == ranks


@pytest.mark.parametrize(
    ("epochs", "steps", "evaluate", "save"),
    [(3, 108, 18, 18), (60, 300, 30, 30), (0.5, 7, 7, 7), (3, 60_000, 10_000, 500), (1, 1, 1, 1)],
)
def test_a_run_evaluates_twice_an_epoch_and_ten_times_at_most(epochs, steps, evaluate, save):
    cfg = TrainConfig(run=RunConfig(num_epochs=epochs))
    found = save_options(cfg, steps, True, {"run.best_figure"})
    assert found == {"run.save_steps": save, "run.evaluate_steps": evaluate}
    assert save_options(cfg, steps, False, set()) == {"run.save_steps": save}


def test_the_published_sizes_are_known_and_costs_are_the_schemas():
    for name, shape in LANGUAGE_MODELS.items():
        assert size_of(ENCODER, shape) == name
    assert size_of(None, None) == "own"
    found, known = costs_of(ENCODER, LANGUAGE_MODELS["2b"]), ModelConfig(name="2b").costs
    assert all(abs(found[key] - known[key]) <= 0.01 * known[key] + 1 for key in known), found


def test_a_name_on_the_hub_is_one_sentence_without_a_network(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    said: list[str] = []
    with pytest.raises(
        ValueError, match="run `hf download DAMO-NLP-SG/VideoLLaMA3-2B --local-dir FOLDER`"
    ) as found:
        download("DAMO-NLP-SG/VideoLLaMA3-2B", said.append)
    assert "\n" not in str(found.value)
    assert said == ["DAMO-NLP-SG/VideoLLaMA3-2B is no folder here: downloading it from the Hugging Face hub"]
    with pytest.raises(ValueError, match=r"--model ./nothing: there is no such folder"):
        download("./nothing", said.append)


def test_what_the_models_processor_says_is_kept(tmp_path: Path):
    assert processor_options(tmp_path) == {}
    (tmp_path / "preprocessor_config.json").write_text('{"merge_size": 2}')
    (tmp_path / "video_preprocessor_config.json").write_text(
        '{"merge_size": 2, "use_token_compression": false}'
    )
    assert processor_options(tmp_path) == {"stage.image_merge_size": 2, "stage.prune_frames": False}
