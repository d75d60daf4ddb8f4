"""Answers are generated in a run as they are after it, with the same weights."""

from __future__ import annotations

import contextlib
import json
import shutil
from argparse import Namespace

import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.contracts.full_disk import files_of_at_most
from tests.engine.runs import run
from vl3train.cli.evaluate import main as evaluate
from vl3train.config.paths import shipped_folder
from vl3train.engine.best import Best
from vl3train.engine.held_out import in_run
from vl3train.engine.held_out.answers import question_of
from vl3train.scoring.predictions import read_predictions


def talkative(language_model, folder):
    """The small demo's language model with other weights: as it is, it ends each answer at once."""
    shutil.copytree(language_model, folder)
    state = load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(3)
    for name, weight in state.items():
        if weight.ndim > 1 and "embed" not in name:
            weight.normal_(std=0.25, generator=draw)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def full_at_first(write):
    """``write``, which finds the disk full when it is called first."""
    left = [1]

    def call(*words):
        with files_of_at_most(0) if left.pop() else contextlib.nullcontext():
            left.append(0)
            write(*words)

    return call


def test_a_run_answers_its_held_out_questions_and_evaluate_gives_the_same(
    demo_words, demo_root, tmp_path, monkeypatch, capsys
):
    """Its disk is full when it evaluates after its first step: nothing but what it writes then is missing."""
    monkeypatch.setattr(in_run, "write_predictions", full_at_first(in_run.write_predictions))
    monkeypatch.setattr(Best, "write", full_at_first(Best.write))
    recipe = yaml.safe_load((shipped_folder("data_recipes") / "demo_stage1.yaml").read_text())
    scored = [source for source in recipe["sources"] if source.get("held_out")][:2]
    for source in scored:
        source["metrics"] = ["exact", "anls"]
    recipe["sources"] = [*scored, next(source for source in recipe["sources"] if source["name"] == "when")]
    right = yaml.safe_dump(recipe)
    recipe["sources"][0] = {**recipe["sources"][0], "metrics": ["mine.py:fails", "exact", "anls"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "mine.py").write_text(
        "import pathlib\n"
        "def fails(prediction, reference, question):\n"
        f"    pathlib.Path({str(tmp_path)!r}, 'recipe.yaml').unlink(missing_ok=True)\n"
        "    return prediction['no text']\n"
    )
    words = [*demo_words, "stage=1", "run.num_steps=2", f"data.recipe={tmp_path / 'recipe.yaml'}"]
    words += [f"model.language_model_from={talkative(demo_root / 'parts/language_model', tmp_path / 'lm')}"]
    words += ["run.evaluate_max_new_tokens=6", "run.evaluate_steps=1", "run.best_figure=loss"]
    folder = run([*words, f"run.output_dir={tmp_path / 'run'}"])
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "predictions/step_000001.jsonl cannot be written: File too large. The run goes on; these answers"
        in said
    )
    assert said.count("metric mine.py:fails failed on the answer") == 2, "also where the recipe is away"
    assert "best.json cannot be written: File too large. The run goes on" in said
    assert not (folder / "predictions" / "step_000001.jsonl").exists()
    assert [one["step"] for one in json.loads((folder / "best.json").read_text())["history"]] == [1, 2]

    first, line = map(json.loads, (folder / "evaluations.jsonl").read_text().splitlines())
    assert (first["step"], line["step"]) == (1, 2)
    found = read_predictions(folder / "predictions" / "step_000002.jsonl")
    assert {one.source for one in found} == {source["name"] for source in scored}
    for source in scored:
        row = line["sources"][source["name"]]
        mine = [one for one in found if one.source == source["name"]]
        assert row["questions"] == row["samples"] == len(mine)
        assert row["anls"] == sum(one.scores["anls"] for one in mine) / len(mine)
        assert row["accuracy"] == row["exact"], (
            "greedy decoding gives the answer where each token is the likeliest"
        )
        assert row["anls_low"] <= row["anls"] <= row["anls_high"]
    assert any(one.prediction for one in found)

    (tmp_path / "recipe.yaml").write_text(right)
    given = {"overrides": [], "model": None, "metrics": None, "max_new_tokens": None}
    given |= {"out": tmp_path / "after.jsonl", "json": tmp_path / "figures.json"}
    assert evaluate(Namespace(run=folder, **given)) == 0
    assert read_predictions(tmp_path / "after.jsonl") == found
    after = json.loads((tmp_path / "figures.json").read_text())
    assert {name: row.get("anls") for name, row in after.items()} == {
        name: row.get("anls") for name, row in line["sources"].items()
    }


def test_the_question_is_the_last_users_words():
    prompt = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|image_pad|><|image_pad|>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\nTime 0.0s:<|video_pad|><|video_pad|>,Time 1.5s:<|video_pad|>\nAnd Time 2?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert question_of(prompt) == "And Time 2?"
