"""Imports point down, and each heavy library has one door."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import vl3train

PACKAGE = Path(vl3train.__file__).parent

MAY_IMPORT = {
    "contracts": set(),
    "config": {"contracts"},
    "scoring": {"contracts"},
    "data": {"contracts", "config", "scoring"},
    "model": {"contracts", "config"},
    "demo": {"contracts", "config", "data", "model"},
    "engine": {"contracts", "config", "scoring", "data", "model"},
    "inference": {"contracts", "config", "data", "model"},
    "report": {"contracts", "config", "scoring", "data"},
    "preview": {"contracts", "config", "data", "model", "engine", "inference", "report"},
    "serving": {"contracts", "config", "data", "model", "inference", "preview", "report"},
    "finetuning": {"contracts", "config", "data", "model", "engine", "inference", "report", "preview"},
    "sweeps": {"contracts", "config", "engine", "report", "finetuning"},
    "cli": {
        "contracts",
        "config",
        "data",
        "model",
        "demo",
        "engine",
        "inference",
        "report",
        "preview",
        "finetuning",
        "serving",
        "sweeps",
    },
    "train.py": {"contracts", "config", "data", "model", "engine", "preview"},
    "launch.py": {"contracts"},
}

INSIDE_DATA = {
    # The same between the rooms of data, a folder or a file each.
    "compiled.py": set(),
    "plan": {"compiled.py"},
    "video": set(),
    "media": {"compiled.py", "video"},
    "pictures": {"media", "video"},
    "shards": {"plan", "media"},
    "records": {"plan", "media", "shards"},
    "render": {"plan", "media", "pictures", "video", "shards", "records"},
    "recipe.py": {"shards"},
    "collate.py": set(),
    "prepare": {"plan", "media", "shards", "records", "render", "recipe.py"},
    "loader.py": {"plan", "media", "shards", "records", "render", "collate.py"},
    "preload.py": {"plan", "media", "loader.py", "compiled.py"},
    "extremes.py": {"plan", "loader.py", "collate.py", "render"},
    "pipeline.py": {"plan", "media", "shards", "render", "recipe.py", "prepare", "loader.py"},
}

DOORS = {
    "hydra": {"config/load.py", "config/input/user_input.py", "config/input/sweeps.py"},
    "webdataset": {"data/prepare/write_shards.py"},
    "deepspeed": {"engine/zero/engine.py", "engine/zero/zero1_bf16.py", "engine/zero/state_files.py"},
    "peft": {"model/adapters.py"},
    "wandb": {"engine/tracking/wandb_tracker.py"},
    "tensorboard": {"engine/tracking/tensorboard_tracker.py"},
    "torch.utils.tensorboard": {"engine/tracking/tensorboard_tracker.py"},
    "numba": {"data/compiled.py"},
    "lmms_eval": {"serving/lmms.py"},
    "bitsandbytes": {"model/kernels/nf4.py"},
    "aiohttp": {
        "cli/serving_options.py",
        "serving/app.py",
        "serving/completions.py",
        "serving/incoming/doors.py",
        "serving/incoming/fetching.py",
        "serving/page.py",
    },
    "flash_attn": {"model/attention/flash_attn_4.py"},
    "triton": {
        "model/kernels/triton_add.py",
        "model/kernels/triton_norm.py",
        "model/kernels/triton_rope.py",
        "model/kernels/triton_split.py",
    },
    "torch.nn.attention.varlen": {"model/attention/backends.py"},
}

MODULE = re.compile(rf"(vl3train|{'|'.join(re.escape(library) for library in DOORS)})(\.\w+)+")
"""A string that is the name of a module of ours, or within a heavy library. A bare word may be an option's value."""


NOT_IMPORTED = {
    ("cli/train.py", "vl3train.train"): "the launcher starts it, in processes of its own",
    ("finetuning/launching.py", "vl3train.train"): "the launcher starts it, in processes of its own",
    ("finetuning/launching.py", "vl3train.launch"): "a process of its own, which this one waits for",
    ("cli/train.py", "vl3train.launch"): "this process becomes it",
    (
        "data/render/processes.py",
        "vl3train.data.preload",
    ): "the fork server loads it for the processes to come",
}
"""Modules that a file names in a string without importing them, with the reason."""


def imported(source: str) -> Iterator[str]:
    """Full names of everything a file imports, within functions too: ``from a import b`` gives a.b.

    Names of modules in strings count as well, as ``import_module`` takes them: "vl3train.demo.command".
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE.fullmatch(node.value):
            yield node.value


def upward(
    source: str, layer: str, inside: str = "vl3train", rules: Mapping[str, set[str]] = MAY_IMPORT
) -> list[str]:
    """Imports that a file of ``layer``, right under the package ``inside``, may not have."""
    found = []
    for name in imported(source):
        if not name.startswith(f"{inside}."):
            continue
        first = name.removeprefix(f"{inside}.").split(".")[0]
        target = first if first in rules else f"{first}.py"
        # a name right under the package, such as __version__, is of no layer
        if target in rules and target != layer and target not in rules[layer]:
            found.append(name)
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
    source, parts = (PACKAGE / path).read_text(), path.split("/")
    found = upward(source, parts[0]) if path != "__init__.py" else []
    if parts[0] == "data" and parts[1] != "__init__.py":
        found += upward(source, parts[1], "vl3train.data", INSIDE_DATA)
    assert [name for name in found if (path, name) not in NOT_IMPORTED] == []


@pytest.mark.parametrize("path", FILES)
def test_a_heavy_library_comes_in_by_its_door(path: str):
    assert round_the_door((PACKAGE / path).read_text(), path) == []


def test_every_folder_is_a_layer():
    entries = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    entries |= {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert entries == set(MAY_IMPORT)


def test_planted_violations_are_caught():
    planted = "def late():\n    from vl3train.model import loss\n    from hydra.core import utils\n    import wandb\n"
    assert upward(planted, "data") == ["vl3train.model.loss"]
    planted_loader = "from vl3train.data.loader import fetch\nfrom vl3train.data import loader\n"
    assert len(upward(planted_loader, "render", "vl3train.data", INSIDE_DATA)) == 2
    assert upward("from vl3train import train\n", "cli") == ["vl3train.train"]
    table = 'COMMANDS = {"train": Command("vl3train.train", "train one stage")}\nimport_module("hydra.core.utils")\n'
    assert upward(table, "cli") == ["vl3train.train"]
    assert upward('"as vl3train.train says"\n', "cli") == []
    assert round_the_door(table, "cli/main.py") == ["hydra.core.utils"]
    assert round_the_door(planted, "data/plan/plan.py") == ["hydra.core.utils", "wandb"]
    assert round_the_door("import wandb_like\n", "data/plan/plan.py") == []
