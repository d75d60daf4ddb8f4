"""Text options stay what was written, in the command line, in a config file and in groups of the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.conftest import write_run_config
from vl3train.config.input.options import OPTIONS
from vl3train.config.input.words import takes_text
from vl3train.config.load import read_config
from vl3train.config.schema import TrainConfig

WRITTEN = [
    "2024_10_01",
    "1_000",
    "010",
    "1e3",
    "1.",
    ".5",
    "-1_0",
    "+5",
    "nan",
    "true",
    "off",
    "2024-10-01",
    "0x1f",
]
TEXTS = [key for key in OPTIONS if takes_text(key)]


def read(*overrides: str, **options: object) -> TrainConfig:
    cfg, found = read_config(list(overrides), **options)  # type: ignore[arg-type]
    assert found == []
    assert cfg is not None
    return cfg


def value_of(cfg: TrainConfig, key: str) -> object:
    section, _, name = key.partition(".")
    return getattr(getattr(cfg, section), name)


def test_paths_and_names_are_text():
    assert {"run.output_dir", "data.root", "data.recipe", "stage.init_from", "tracking.project"} <= set(TEXTS)
    assert not {"adapter.parts", "stage.learning_rates", "run.seed"} & set(TEXTS)


@pytest.mark.parametrize("written", WRITTEN)
def test_what_was_written_stays(written: str, tmp_path: Path):
    line = read("stage=2", *(f"{key}={written}" for key in TEXTS))
    file = tmp_path / "mine.yaml"
    file.write_text("stage: 2\n" + "".join(f"{key}: {written}\n" for key in TEXTS))
    for cfg in (line, read(config_file=file), read(config_file=write_run_config(line, tmp_path))):
        assert {key: value_of(cfg, key) for key in TEXTS} == dict.fromkeys(TEXTS, written)


def test_null_leaves_an_option_unset_where_it_may_be():
    cfg = read("stage=2", "data.recipe=null", "run.output_dir=null", "tracking.entity='null'")
    assert (cfg.data.recipe, cfg.run.output_dir, cfg.tracking.entity) == (None, "null", "null")


def test_null_of_a_file_is_no_text(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("stage: 2\ndata: {recipe: null}\nrun: {output_dir: ~}\n")
    cfg, found = read_config([], config_file=file)
    assert cfg is not None
    assert cfg.data.recipe is None
    assert [str(problem) for problem in found] == ["run.output_dir=null: is of the wrong kind; it takes text"]


def test_numbers_stay_numbers(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("stage: 2\nrun: {seed: 1_0, num_epochs: 1e3}\n")
    cfg = read("step.max_tokens=1_024", config_file=file)
    assert (cfg.run.seed, cfg.run.num_epochs, cfg.step.max_tokens) == (10, 1000.0, 1024)


def test_anchors_and_merges_of_yaml_still_work(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("stage: 2\ntracking: {<<: {project: 1_0}, entity: me}\n")
    assert read(config_file=file).tracking.project == "1_0"
    file.write_text("tracking: {project: &name 2024_10_01}\nrun: {output_dir: *name}\nstage: 2\n")
    assert read(config_file=file).run.output_dir == "2024_10_01"


def test_inside_braces_a_number_is_told():
    [problem] = read_config(["stage=2", "run={output_dir: 2024_10_01}"])[1]
    assert str(problem).startswith("run.output_dir=20241001: was read as a number")
    assert read("stage=2", "run={output_dir: '2024_10_01'}").run.output_dir == "2024_10_01"


def test_groups_of_the_users_own_keep_their_text_and_their_names(tmp_path: Path):
    for group in ("data", "tracking"):
        (tmp_path / group).mkdir()
    (tmp_path / "data" / "2024_10_01.yaml").write_text("root: 2024_10_01\nrecipe: 1e3\nmax_frames: 1_0\n")
    (tmp_path / "tracking" / "010.yaml").write_text(
        "# @package _global_\ntracking: {project: 1_1}\nrun: {output_dir: 1_2}\n"
    )
    words = ["stage=2", "data=2024_10_01", "tracking=010"]
    cfg = read(*words, config_dir=tmp_path)
    assert (cfg.data.root, cfg.data.recipe, cfg.data.max_frames) == ("2024_10_01", "1e3", 10)
    assert (cfg.tracking.project, cfg.run.output_dir) == ("1_1", "1_2")
    assert read(*words, "data.root=x", config_dir=tmp_path).data.root == "x"
