"""Imports point down, and each heavy library has one door."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vl3train

PACKAGE = Path(vl3train.__file__).parent

MAY_IMPORT = {
    "contracts": set(),
    "config": set(),
    "data": {"contracts", "config"},
    "model": {"contracts", "config"},
    "demo": {"contracts", "config", "data", "model"},
    "engine": {"contracts", "config", "data", "model"},
    "cli": {"contracts", "config", "data", "model", "engine"},
}

DOORS = {
    "hydra": {"config/load.py"},
    "webdataset": {"data/shards.py"},
    "deepspeed": {"engine/zero.py", "engine/zero_1.py"},
    "peft": {"model/adapters.py"},
    "wandb": {"engine/track.py"},
    "numba": {"data/balance.py", "data/passes.py", "data/resampling.py"},
    "flash_attn": {"model/flash_attn_4.py"},
    "triton": {
        "engine/gradient_kernel.py",
        "engine/split_kernel.py",
        "model/norm_kernels.py",
        "model/rotate_kernel.py",
    },
    "torch.nn.attention.varlen": {"model/attention.py"},
}


def imported(source: str) -> Iterator[str]:
    """Full names of everything a file imports, within functions too: ``from a import b`` gives a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def upward(source: str, layer: str) -> list[str]:
    """Imports that a file of ``layer`` may not have."""
    found = []
    for name in imported(source):
        root, *rest = name.split(".")
        # a name right under vl3train, such as __version__, is of no layer
        if root == "vl3train" and rest and rest[0] in MAY_IMPORT and rest[0] != layer:
            found += [name] if rest[0] not in MAY_IMPORT[layer] else []
    return found


def round_the_door(source: str, path: str) -> list[str]:
    """Imports of a heavy library in a file that is not its door."""
    names = list(imported(source))
    return [
        name
        for library, doors in DOORS.items()
        for name in names
        if f"{name}.".startswith(f"{library}.") and path not in doors
    ]


FILES = sorted(str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES)
def test_imports_point_down(path: str):
    layer = path.split("/")[0]
    if layer in MAY_IMPORT:
        assert upward((PACKAGE / path).read_text(), layer) == []


@pytest.mark.parametrize("path", FILES)
def test_a_heavy_library_comes_in_by_its_door(path: str):
    assert round_the_door((PACKAGE / path).read_text(), path) == []


def test_every_folder_is_a_layer():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(MAY_IMPORT)


def test_planted_violations_are_caught():
    planted = "def late():\n    from vl3train.model import loss\n    from hydra.core import utils\n    import wandb\n"
    assert upward(planted, "data") == ["vl3train.model.loss"]
    assert round_the_door(planted, "data/plan.py") == ["hydra.core.utils", "wandb"]
    assert round_the_door("import wandb_like\n", "data/plan.py") == []
