"""The command measures a recipe; a run with the same config then finds its index, and nothing is done twice."""

from __future__ import annotations

from argparse import ArgumentParser

import pytest

from tests.data.shards_fixture import make_recipe
from vl3train.cli import build_index
from vl3train.cli.build_index import tokenizer_source
from vl3train.config.load import load_config
from vl3train.data.pipeline import open_data
from vl3train.model.conversion import build_processor


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
    processor_dir = tmp_path / "processor"  # as engine/run.py makes it
    build_processor(tokenizer_source(cfg), data=cfg.data, prune_frames=True).save_pretrained(processor_dir)
    data = open_data(cfg, tokenizer_dir=processor_dir, held_out=False, build=False)
    assert data.index.num_samples == 37


def test_a_faulty_config_is_refused(tmp_path):
    parser = ArgumentParser()
    build_index.add_arguments(parser)
    with pytest.raises(ValueError, match="init_from"):
        build_index.main(parser.parse_args(["stage=2", "model=debug", f"data.root={tmp_path}"]))
