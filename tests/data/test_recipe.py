"""Shipped recipes hold the published numbers; a faulty one is refused with every fault at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vl3train.config.paths import shipped_folder
from vl3train.data.recipe import find_recipe, load_recipe, recipe_problems

PUBLISHED = {"stage1": 15_570_000, "stage2": 27_220_000, "stage3": 19_050_000, "stage4": 5_710_000}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_mixtures_have_their_published_size(name):
    recipe = load_recipe(name, "data")
    assert sum(recipe.published_groups.values()) == pytest.approx(PUBLISHED[name], rel=1e-3)
    assert {source.group for source in recipe.sources} == set(recipe.published_groups)
    assert all(source.origin and source.weight == 1.0 for source in recipe.sources)
    assert len({source.name for source in recipe.sources}) == len(recipe.sources)
    assert recipe.name == name


def test_every_shipped_recipe_parses():
    assert {file.stem for file in shipped_folder("data_recipes").glob("*.yaml")} >= set(PUBLISHED)
    for file in shipped_folder("data_recipes").glob("*.yaml"):
        load_recipe(str(file), "data")


def test_missing_shards_are_listed_with_their_origin_and_the_way_out(tmp_path):
    recipe = load_recipe("stage1", tmp_path)
    folder = tmp_path / "idl-wds"
    folder.mkdir()
    (folder / "shard-000000.tar").write_bytes(b"")
    (problem,) = recipe_problems(recipe, tmp_path)
    assert "pixparse/pdfa-eng-wds" in problem
    assert str(tmp_path / "vl3-syn7m-short") in problem
    assert "idl-wds" not in problem
    assert "vl3train shards" in problem


def test_names_and_weights_that_cannot_be_are_problems(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nabout: test\nsources:\n"
        "  - {name: a, shards: x}\n  - {name: a, shards: x}\n  - {name: b, shards: x, weight: 0}\n"
    )
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "s.tar").write_bytes(b"")
    problems = recipe_problems(load_recipe(str(path), tmp_path), tmp_path)
    assert len(problems) == 2
    assert "2 sources are named a" in problems[0]
    assert "weight=0.0 must be above 0" in problems[1]
    path.write_text("name: mine\nabout: test\nsources:\n  - {name: a, shards: x, weight: .inf}\n")
    (problem,) = recipe_problems(load_recipe(str(path), tmp_path), tmp_path)
    assert "weight=inf" in problem
    path.write_text("name: mine\nabout: test\nsources:\n  - {name: a, shards: x, weight: true}\n")
    with pytest.raises(ValueError, match="weight=True must be float"):
        load_recipe(str(path), tmp_path)


def test_a_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_bytes("name: Größe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"mine\.yaml: not YAML"):
        load_recipe(str(tmp_path / "mine.yaml"), tmp_path)


def test_all_faults_of_form_come_in_one_error(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nsources:\n"
        "  - {name: a, shard: x}\n  - {name: b, shards: x, weight: much}\n  - just a word\n"
        "  - {name: c, shards: x, group: nowhere}\n"
    )
    with pytest.raises(ValueError, match="not a valid recipe") as error:
        load_recipe(str(path), tmp_path)
    for part in (
        "about is missing",
        "unknown key shard; did you mean shards?",
        "weight='much' must be float",
        "source 3: is str",
        "group 'nowhere'",
    ):
        assert part in str(error.value)


def test_a_source_may_be_only_evaluated_but_must_have_samples_of_some_kind(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: m\nabout: x\nsources:\n  - {name: a, held_out: a-held-out}\n")
    (source,) = load_recipe(str(file), tmp_path).sources
    assert (source.shards, source.held_out) == (None, tmp_path / "a-held-out")
    file.write_text("name: m\nabout: x\nsources:\n  - {name: a, weight: 2}\n")
    with pytest.raises(ValueError, match="source a: shards is missing"):
        load_recipe(str(file), tmp_path)


def test_unknown_names_are_answered_with_those_there_are():
    with pytest.raises(ValueError, match=r"did you mean stage3\?.*stage1, stage2"):
        find_recipe("stage_3")
    with pytest.raises(ValueError, match="no such file"):
        find_recipe("no/such/file.yaml")


def test_reading_a_recipe_does_not_import_torch():
    code = "import sys; from vl3train.data.recipe import load_recipe; load_recipe('stage1', 'data'); "
    code += "print([name for name in ('torch', 'numpy', 'pyarrow') if name in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
