"""What each row of benchmarks/start.py starts, and on which data."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from benchmarks.gpu.rows import ROWS as GPU_ROWS

NUM_SOURCES = 11


@dataclass(frozen=True, kw_only=True)
class StartRow:
    """One kind of start."""

    figure: str
    aim: float | None = None
    cold: bool = False  # nothing compiled, checked or indexed before; else the same start ran once, untimed
    new_index: bool = False  # the untimed start does not leave its index
    ranks: int = 1
    data: str = "demo"  # demo, sources (of the demo), or a row of benchmarks/gpu/rows.py
    words: tuple[str, ...] = ()
    phase: str | None = None
    """The figure is the time of this phase; None: of all from the command to the end of the first step."""


DEBUG = ("stage=1", "model=debug", "data=demo")
LORA = ("adapter=lora", "adapter.rank=64")
ROWS: dict[str, StartRow] = {
    "debug_cpu": StartRow(
        figure="start_warm_debug_cpu_seconds",
        aim=10,
        ranks=2,
        words=(*DEBUG, "machine=cpu", "data.num_workers=1"),
    ),
    "index": StartRow(
        figure="index_11_sources_seconds",
        aim=3,
        new_index=True,
        data="sources",
        words=(*DEBUG, "machine=one_cpu"),
        phase="start: data",
    ),
    "compiled_cpu": StartRow(  # what a start with compiled layers costs on the host
        figure="start_warm_compiled_cpu_seconds",
        words=(*DEBUG, "machine=one_cpu", "machine.compile_layers=true", "data.num_workers=0"),
    ),
    "debug_gpu": StartRow(figure="start_warm_debug_seconds", aim=8, words=(*DEBUG, "machine=one_gpu")),
    "2b_cold": StartRow(figure="start_cold_2b_seconds", cold=True, data="2b_train_command"),
    "2b_warm": StartRow(figure="start_warm_2b_seconds", data="2b_train_command"),
    "7b_lora_warm": StartRow(
        figure="start_warm_7b_lora_seconds", aim=30, data="7b_train_command", words=LORA
    ),
}
GPU_WORDS = ("machine=one_gpu", "machine.compile_layers=true", "machine.memory=auto")


def row_data(row: StartRow, folder: Path) -> list[str]:
    """Make the data of a row below ``folder``, unless they are there; the words of a run on them."""
    done = folder / row.data / "words.txt"
    if not done.exists():
        done.parent.mkdir(parents=True, exist_ok=True)
        words = _demo(folder, row.data) if row.data in ("demo", "sources") else _drawn(row.data, done.parent)
        done.write_text("\n".join(words), encoding="utf-8")
    return [*done.read_text(encoding="utf-8").split("\n"), *row.words]


def _demo(folder: Path, what: str) -> list[str]:
    demo = folder / "demo-data"
    if not demo.exists():
        command = [sys.executable, "-m", "vl3train.cli.main", "demo", str(demo), "--samples-scale", "0.02"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    words = [f"data.root={demo}"]
    return words if what == "demo" else [*words, f"data.recipe={_many_sources(demo, folder / what)}"]


def _many_sources(demo: Path, folder: Path) -> Path:
    """A recipe of ``NUM_SOURCES`` sources, each a folder with one shard of the demo."""
    shards = sorted(path for path in demo.rglob("*.tar") if "held_out" not in str(path))
    sources = []
    for number in range(NUM_SOURCES):
        place = folder / f"source-{number:02d}"
        place.mkdir(parents=True)
        os.link(shards[number % len(shards)], place / "shard-000000.tar")
        sources.append({"name": place.name, "shards": str(place)})
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"name": "sources", "about": "Small sources.", "sources": sources}))
    return recipe


def _drawn(name: str, folder: Path) -> list[str]:
    """Drawn pictures and random weights of the published shapes, for one GPU."""
    import torch

    from benchmarks.gpu.command import prepare_run

    row = replace(GPU_ROWS[name], ranks=1, zero_stage=1, steps=2)
    words = prepare_run(row, torch.device("cuda"), folder)
    given = ("tracking", "run.output_dir=", "run.num_steps=", "data.plan_cache=", "machine")
    kept = [word for word in words if not word.startswith(given)]
    return [*kept, *GPU_WORDS, f"machine.offload_optimizer={str(row.offload_optimizer).lower()}"]
