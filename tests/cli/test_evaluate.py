"""A trained model is measured wherever it lies, whatever became of what it started from."""

from __future__ import annotations

import json
import os
import tarfile
from argparse import Namespace
from pathlib import Path

import pytest

from tests.config.conftest import write_run_config
from tests.data.shards_fixture import make_source
from vl3train.cli.evaluate import main
from vl3train.config.load import read_config
from vl3train.config.problems import ConfigError
from vl3train.engine.held_out import of_model
from vl3train.engine.held_out.answers import PredictionsInProgress
from vl3train.inference.answer import Asker
from vl3train.inference.requests import Request
from vl3train.scoring.predictions import read_predictions


def test_what_a_run_started_from_need_not_be_there_and_other_mistakes_are_told(tmp_path):
    words = ["stage=2", "model=debug", "data=demo", f"stage.init_from={tmp_path / 'gone'}"]
    cfg, _ = read_config([*words, f"data.root={tmp_path / 'nowhere'}", f"run.output_dir={tmp_path}"])
    write_run_config(cfg, tmp_path)
    with pytest.raises(ConfigError) as caught:
        main(
            Namespace(
                run=tmp_path, overrides=["step.max_tokens=0"], max_new_tokens=None, out=Path("p"), json=None
            )
        )
    keys = [problem.key for problem in caught.value.problems]
    assert {"step.max_tokens", "data.root"} <= set(keys)
    assert "stage.init_from" not in keys


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Held-out pictures, clips and text, scored by two metrics and a function of the user's own."""
    root = tmp_path_factory.mktemp("questions")
    make_source(root / "test", images=3, clips=2, texts=2, seed=4, per_shard=3)
    (root / "mine.py").write_text(
        "def length(prediction, reference, question):\n    return len(prediction)\n"
    )
    (root / "recipe.yaml").write_text(
        "name: small\nabout: tests\nsources:\n"
        "  - {name: test, held_out: test/shards, metrics: [exact, anls, 'mine.py:length']}\n"
    )
    return root / "recipe.yaml"


def evaluation(lively_model_dir, recipe, folder, **changed):
    words = [f"data.recipe={recipe}", f"data.root={recipe.parent}", "data.num_workers=0", "machine=cpu"]
    given = {
        "run": lively_model_dir,
        "overrides": words,
        "model": None,
        "json": folder / "figures.json",
        "metrics": None,
        "max_new_tokens": 12,
        "out": folder / "predictions.jsonl",
    }
    return Namespace(**{**given, **changed})


def open_member(path):
    """The bytes of a member, of a path through its tar."""
    with tarfile.open(Path(path).parent) as tar:
        return tar.extractfile(Path(path).name).read()


def test_an_export_answers_as_generate_does(lively_model_dir, recipe, tmp_path, capsys):
    assert main(evaluation(lively_model_dir, recipe, tmp_path)) == 0
    predictions = read_predictions(tmp_path / "predictions.jsonl")
    asker = Asker.load(lively_model_dir, device="cpu", max_new_tokens=12)
    media = recipe.parent / "test" / "media"
    kinds = {"How many?": "image", "Describe.": "video"}
    asked = set()
    for one in predictions:
        number = "".join(char for char in one.reference if char.isdigit())
        kind = kinds.get(one.question, "text")
        request = Request(
            prompt=one.question,
            images=(media / f"{number}.png",) if kind == "image" else (),
            videos=(media / f"{number}.mp4",) if kind == "video" else (),
        )
        assert [one.prediction] == asker.answers([request])
        assert [open_member(path) for path in one.media] == [
            path.read_bytes() for path in (*request.images, *request.videos)
        ]
        assert one.scores["mine.py:length"] == len(one.prediction)
        asked.add(kind)
    assert len(predictions) == 7
    assert asked == {"image", "video", "text"}
    row = json.loads((tmp_path / "figures.json").read_text())["test"]
    assert row["questions"] == row["samples"] == 7
    assert row["mine.py:length"] == pytest.approx(sum(len(one.prediction) for one in predictions) / 7)
    assert row["mine.py:length_low"] <= row["mine.py:length"] <= row["mine.py:length_high"]
    assert "mine.py:length" in capsys.readouterr().out


def test_an_evaluation_that_was_stopped_goes_on(lively_model_dir, recipe, tmp_path, monkeypatch):
    """Answers of the same weights and settings are not generated anew, those of others are."""
    generate, asked = of_model.generate_predictions, []

    def stopped(*args, **options):
        tell = options["tell"]

        def tell_three(one):
            if len(asked) == 3:
                raise KeyboardInterrupt
            asked.append(one)
            tell(one)

        return generate(*args, **{**options, "tell": tell_three})

    monkeypatch.setattr(of_model, "generate_predictions", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(evaluation(lively_model_dir, recipe, tmp_path))
    (partial,) = tmp_path.glob("*.partial")
    text = partial.read_text().replace(json.dumps(asked[0].prediction, ensure_ascii=False), '"kept"')
    partial.write_text(text + '{"key": "cut short')
    monkeypatch.setattr(of_model, "generate_predictions", generate)
    assert main(evaluation(lively_model_dir, recipe, tmp_path)) == 0
    found = {one.place: one.prediction for one in read_predictions(tmp_path / "predictions.jsonl")}
    assert len(found) == 7
    assert found[asked[0].place] == "kept"
    assert not list(tmp_path.glob("*.partial"))

    monkeypatch.chdir(tmp_path)
    for strange in ("", "{", text + '{"key": 1}\n[]\nnull\n{"cut', "\0\n" + text):
        partial.write_text(strange)
        assert len(
            PredictionsInProgress(Path("predictions.jsonl"), json.loads(text.split("\n")[0]), 0).known
        ) == (3 if strange.startswith(text) else 0)
    partial.write_text(text + '{"cut')
    again = PredictionsInProgress(Path("predictions.jsonl"), json.loads(text.split("\n")[0]), 0)
    again.add(asked[0])
    assert partial.read_text().splitlines()[:-1] == text.splitlines(), "nothing was added to the cut line"
    partial.unlink()

    other = tmp_path / "other"
    other.mkdir()
    (other / partial.name).write_text(text)
    assert main(evaluation(lively_model_dir, recipe, other, max_new_tokens=5)) == 0
    found = {one.place: one.prediction for one in read_predictions(other / "predictions.jsonl")}
    assert found[asked[0].place] != "kept"


def test_samples_without_figures_are_told_and_old_answers_to_other_samples_are_not_used(
    lively_model_dir, tmp_path, capsys, monkeypatch
):
    """A clip's bytes change behind the index; then the shard is indexed again, in an evaluation that goes on."""
    make_source(tmp_path / "test", images=2, clips=1, texts=1, seed=4, per_shard=9)
    (tmp_path / "recipe.yaml").write_text(
        "name: small\nabout: tests\nsources: [{name: test, held_out: test/shards, metrics: [exact]}]\n"
    )
    finish = PredictionsInProgress.finish
    monkeypatch.setattr(PredictionsInProgress, "finish", lambda one: None)
    assert main(evaluation(lively_model_dir, tmp_path / "recipe.yaml", tmp_path)) == 0
    assert "could not be read" not in capsys.readouterr().out
    [shard] = tmp_path.glob("test/shards/*.tar")
    with tarfile.open(shard) as tar:
        [clip] = [member for member in tar if member.name.endswith(".mp4")]
    before, bytes_ = shard.stat(), bytearray(shard.read_bytes())
    bytes_[clip.offset_data + 40 : clip.offset_data + clip.size] = bytes(clip.size - 40)
    shard.write_bytes(bytes_)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert main(evaluation(lively_model_dir, tmp_path / "recipe.yaml", tmp_path)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 held-out sample could not be read, and no figure counts them: " in said
    shard.touch()
    monkeypatch.setattr(PredictionsInProgress, "finish", finish)
    assert main(evaluation(lively_model_dir, tmp_path / "recipe.yaml", tmp_path)) == 0
    assert "held-out samples: the index rejected 1 samples" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())["test"]
    assert figures["questions"] == figures["samples"] == 3


def test_files_that_cannot_be_written_are_told_before_the_work(lively_model_dir, recipe, tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*away; make it first\n.* is a folder"):
        main(evaluation(lively_model_dir, recipe, tmp_path, out=tmp_path / "away/p.jsonl", json=tmp_path))


def test_metrics_that_cannot_be_used_are_told_together_before_anything_runs(
    lively_model_dir, recipe, tmp_path
):
    names = ["exakt", "mine.py:score", "gone.py:score"]
    with pytest.raises(ValueError, match=r"did you mean exact\?\n.*no file mine.py\n.*no file gone.py"):
        main(evaluation(lively_model_dir, recipe, tmp_path, metrics=names))
    bad = recipe.parent / "bad.yaml"
    bad.write_text(recipe.read_text().replace("exact", "cidre").replace(":length", ":width"))
    with pytest.raises(
        (ConfigError, ValueError), match=r"(?s)did you mean cider\?.*defines no function width"
    ):
        main(evaluation(lively_model_dir, bad, tmp_path))
