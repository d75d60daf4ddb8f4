"""A small indexed recipe and the words of a command line that trains on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.shards_fixture import make_recipe
from vl3train.cli.main import main


def config_words(root: Path, tiny_model_dir: Path, *more: str) -> list[str]:
    """Stage 3 of the tiny model on a recipe of pictures, clips and text below ``root``."""
    words = [
        "stage=3",
        "model=debug",
        f"stage.init_from={tiny_model_dir}",
        f"data.recipe={root / 'recipe.yaml'}",
    ]
    words += [
        f"data.root={root}",
        "data.num_workers=0",
        "data.max_frames=8",
        "data.max_visual_tokens=250",
        "machine=cpu",
    ]
    words += ["step.max_tokens=400", "step.max_patches=1200", "step.global_packs=4", "step.max_samples=12"]
    return [*words, f"run.output_dir={root / 'run'}", *more]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> list[str]:
    """The words, after `vl3train index` with them."""
    root = tmp_path_factory.mktemp("data")
    make_recipe(root)
    found = config_words(root, tiny_model_dir)
    assert main(["index", *found]) == 0
    return found
