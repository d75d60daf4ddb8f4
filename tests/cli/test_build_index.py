"""The command measures a recipe; a run with the same config then finds its index, and nothing is done twice."""

from __future__ import annotations

import json
from argparse import ArgumentParser

import pyarrow.parquet as pq
import pytest
import yaml

from tests.cli.indexed import config_words
from tests.data.faults_fixture import jpeg
from tests.data.shards_fixture import make_recipe
from vl3train.cli import build_index
from vl3train.cli.main import main
from vl3train.config.load import load_config
from vl3train.config.paths import tokenizer_source
from vl3train.data.pipeline import open_data
from vl3train.data.prepare.write_shards import write_members
from vl3train.model.weights.processor import build_processor


def test_a_run_finds_the_index_that_the_command_made(tmp_path, tiny_model_dir, capsys):
    recipe = make_recipe(tmp_path)
    (tmp_path / "words" / "shards" / "notes.txt").write_text("not a shard")
    words = ["stage=3", "model=debug", f"stage.init_from={tiny_model_dir}", f"data.recipe={recipe}"]
    words += [f"data.root={tmp_path}", "data.num_workers=0", "data.max_frames=8", "machine=cpu"]
    words += [f"run.output_dir={tmp_path / 'run'}"]
    parser = ArgumentParser()
    build_index.add_arguments(parser)
    assert build_index.main(parser.parse_args(words)) == 0
    out = capsys.readouterr().out
    assert "training samples" in out
    assert "words: 20 samples" in out
    assert "held-out samples" in out
    assert "clips: 7 samples" in out

    cfg = load_config(words)
    processor_dir = tmp_path / "processor"  # as engine/start/folder.py makes it
    build_processor(tokenizer_source(cfg), data=cfg.data, prune_frames=True).save_pretrained(processor_dir)
    data = open_data(cfg, tokenizer_dir=processor_dir, held_out=False, build=False)
    assert data.index.num_samples == 37


def test_a_faulty_config_is_refused(tmp_path):
    parser = ArgumentParser()
    build_index.add_arguments(parser)
    with pytest.raises(ValueError, match="init_from"):
        build_index.main(parser.parse_args(["stage=2", "model=debug", f"data.root={tmp_path}"]))


def test_changed_bits_of_a_picture_are_refused_with_decode_and_indexed_without(
    tmp_path, tiny_model_dir, capsys
):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    text, whole = json.dumps({"conversations": turns}).encode(), jpeg(1)
    (tmp_path / "pictures").mkdir()
    middle = len(whole) // 2
    pictures = {"a": whole, "b": whole[:middle] + b"\xff\x00" * 9 + whole[middle + 18 :], "c": whole}
    members = [(key, {"json": text, "jpg": data}) for key, data in pictures.items()]
    write_members(tmp_path / "pictures" / "0.tar", members)
    recipe = {"name": "cut", "about": "", "sources": [{"name": "cut", "shards": "pictures"}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = config_words(tmp_path, tiny_model_dir)
    assert main(["index", *words]) == 0  # from its markers it cannot be told
    assert "cut: 3 samples" in capsys.readouterr().out
    assert main(["index", *words, "--decode"]) == 0  # what was indexed otherwise is indexed again
    out = capsys.readouterr().out
    assert "cut: 2 samples" in out
    assert "1 are rejected" in out
    assert "cut/0/b: image of" in out
    (file,) = (tmp_path / "pictures").glob("index-*/0.tar.parquet")
    statuses = pq.read_table(file)["status"].to_pylist()
    assert [status == "ok" for status in statuses] == [True, False, True]
    assert "it is damaged" in statuses[1]
    written = file.stat().st_mtime_ns
    assert main(["index", *words]) == 0  # what was decoded is good for a run that does not ask for it
    assert file.stat().st_mtime_ns == written


def test_the_index_may_lie_in_a_folder_of_its_own(tmp_path, tiny_model_dir, capsys):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    (tmp_path / "words").mkdir()
    text = json.dumps({"conversations": turns}).encode()
    write_members(tmp_path / "words" / "0.tar", [("a", {"json": text})])
    recipe = {"name": "w", "about": "", "sources": [{"name": "words", "shards": "words"}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = config_words(tmp_path, tiny_model_dir)
    assert main(["index", *words, "--index-dir", str(tmp_path / "far")]) == 0
    assert [path.name for path in (tmp_path / "words").iterdir()] == ["0.tar"]
    assert main(["plan", *words, "--picture", str(tmp_path / "plan.png")]) == 1
    assert "no index" in capsys.readouterr().err
    words.append(f"data.index_dir={tmp_path / 'far'}")
    assert main(["plan", *words, "--picture", str(tmp_path / "plan.png")]) == 0


def test_refused_samples_are_told_by_kind(tmp_path, tiny_model_dir, capsys):
    """Of thousands that lack their picture a few would be shown alone, and the one of another kind never."""
    asked = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    said_nothing = [{"from": "human", "value": "What?"}]
    (tmp_path / "words").mkdir()
    texts = [json.dumps({"conversations": turns}).encode() for turns in [asked] * 7 + [said_nothing]]
    write_members(tmp_path / "words" / "0.tar", [(f"k{n}", {"json": text}) for n, text in enumerate(texts)])
    good = json.dumps({"conversations": asked}).encode()
    write_members(tmp_path / "words" / "1.tar", [("good", {"json": good, "jpg": jpeg(1)})])
    recipe = {"name": "bad", "about": "", "sources": [{"name": "bad", "shards": "words"}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["index", *config_words(tmp_path, tiny_model_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.endswith("8 are rejected:"))
    assert lines[at + 1].strip() == "7 like these:"
    assert [line.split(":")[0].strip() for line in lines[at + 2 : at + 5]] == [
        f"bad/0/k{n}" for n in range(3)
    ]
    assert lines[at + 5].strip() == "one:"
    assert lines[at + 6].strip().startswith("bad/0/k7: ")
    assert not any("k3:" in line for line in lines)


def test_stored_frames_are_indexed_under_their_own_recipe(tmp_path, tiny_model_dir, capsys):
    make_recipe(tmp_path)
    words, frames = config_words(tmp_path, tiny_model_dir), tmp_path / "frames"
    assert main(["index", *words, "--store-frames", str(frames)]) == 0
    out = capsys.readouterr().out
    assert f"train on them with data.recipe={frames / 'recipe.yaml'}" in out
    assert "clips: 8 samples" in out
    shards = sorted(path.relative_to(frames) for path in frames.rglob("*.tar"))
    assert any(path.parts[1] == "held_out" for path in shards)
    words = [*words, f"data.recipe={frames / 'recipe.yaml'}", "--picture", str(tmp_path / "plan.png")]
    assert main(["plan", *words]) == 0  # indexed: nothing is missing
    assert not list(tmp_path.glob("clips/**/index-*"))  # the clips themselves need no index
