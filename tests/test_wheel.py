"""The wheel carries configs and recipes, and the installed package finds them away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vl3train

CHECKOUT = Path(vl3train.__file__).parents[1]


def run(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without the network: hatchling is in the dev extra."""
    folder = tmp_path_factory.mktemp("wheel")
    arguments = ("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), ".")
    done = run("-m", "pip", *arguments, cwd=CHECKOUT)
    assert done.returncode == 0, done.stderr
    [file] = folder.glob("*.whl")
    return file


def test_it_carries_what_the_checkout_has(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("configs", "data_recipes"):
        files = [file for file in (CHECKOUT / folder).rglob("*") if file.is_file()]
        assert files
        assert {f"vl3train/{file.relative_to(CHECKOUT)}" for file in files} <= names
    code = {str(file.relative_to(CHECKOUT)) for file in (CHECKOUT / "vl3train").rglob("*.py")}
    assert code <= names


def test_the_installed_package_checks_a_config_elsewhere(wheel: Path, tmp_path: Path):
    site = tmp_path / "site"
    arguments = ("install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    done = run("-m", "pip", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    where = "import vl3train.config.paths as p; print(p.shipped_folder('configs'), p.shipped_folder('data_recipes'))"
    found = run("-c", where, cwd=tmp_path, PYTHONPATH=str(site)).stdout.split()
    assert found == [str(site / "vl3train" / "configs"), str(site / "vl3train" / "data_recipes")]

    (tmp_path / "data").mkdir()
    checked = run(
        *("-m", "vl3train.cli.main", "check", "stage=1", "model=2b"), cwd=tmp_path, PYTHONPATH=str(site)
    )
    assert checked.returncode == 1, checked.stderr
    # All that is wrong is that there are no shards: config and recipe were found.
    assert checked.stdout.splitlines()[:2] == ["1 problem: this run cannot start", "1. data.recipe=stage1"]
    assert "no .tar shards" in checked.stdout

    script = (site / "bin" / "vl3train").read_text()
    assert "vl3train.cli.main" in script
