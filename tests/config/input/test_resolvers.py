"""No config file reads the environment: what it holds would be printed, saved and tracked."""

from __future__ import annotations

import doctest

import pytest

import vl3train.config.input.resolvers as resolvers
from vl3train.config.load import read_config

NAME, SECRET = "PLANTED_FOR_THIS_TEST", "value-of-the-environment"
WRITTEN = [
    f"${{oc.env:{NAME}}}",
    f"/data/${{oc.env:{NAME},none}}/x",
    f"${{oc.decode:${{oc.env:{NAME}}}}}",
    f"${{${{stage.name}}:{NAME}}}",
    "${now:%Y}",
    "${hydra:runtime.cwd}",
]


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    monkeypatch.setenv(NAME, SECRET)


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(resolvers).failed == 0


def refused(overrides, **more):
    cfg, found = read_config(["stage=1", "model=debug", *overrides], **more)
    said = "\n".join(map(str, found))
    assert cfg is None
    assert "calls a function, and options hold values only" in said
    assert SECRET not in said
    return said


@pytest.mark.parametrize("value", WRITTEN)
def test_the_command_line_and_a_config_file_call_nothing(tmp_path, value):
    assert "run.output_dir" in refused([f"run.output_dir='{value}'"])
    file = tmp_path / "mine.yaml"
    file.write_text(f"data: {{root: '{value}'}}\nstage: {{learning_rates: {{projector: '{value}'}}}}\n")
    said = refused([], config_file=file)
    assert "data.root" in said
    assert "stage.learning_rates" in said


@pytest.mark.parametrize("value", WRITTEN)
@pytest.mark.parametrize(
    "content",
    ["root: '{}'\n", "defaults: ['/model@_here_: \"{}\"']\n", "# @package _global_\nrun: {{seed: '{}'}}\n"],
)
def test_neither_does_a_group_of_ones_own(tmp_path, value, content):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(content.format(value))
    assert "mine.yaml" in refused(["data=mine"], config_dir=tmp_path)


def test_nor_a_file_that_it_names(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("defaults: [other]\n")
    (tmp_path / "data" / "other.yaml").write_text(f"root: '{WRITTEN[0]}'\n")
    assert "data.root" in refused(["data=mine"], config_dir=tmp_path)


def test_values_of_other_options_are_filled_in(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("run: {output_dir: 'runs/${stage.name}:${run.seed}'}\n")
    cfg, found = read_config(["stage=1", "model=debug", "run.seed=7"], config_file=file)
    assert cfg is not None, found
    assert cfg.run.output_dir == f"runs/{cfg.stage.name}:7"


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.getcwd []", "!!python/name:os.getcwd ''"])
def test_a_config_file_builds_no_python_object(tmp_path, tag):
    file = tmp_path / "mine.yaml"
    file.write_text(f"data: {{root: {tag}}}\n")
    _, found = read_config(["stage=1", "model=debug"], config_file=file)
    assert any("is not YAML" in str(one) for one in found)
