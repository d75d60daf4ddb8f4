"""Read checkpoints whole, and say which of their files are not what was written.

Each checkpoint has a MANIFEST.json with the size and a digest of every file. A run does the same when it resumes; this
command needs no GPU and no torch. It returns 1 where a file is damaged, and 0 where all are whole.

examples:
  vl3train verify-checkpoint runs/2b/2_alignment
  vl3train verify-checkpoint runs/2b/2_alignment/checkpoints/step_00001000
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from vl3train.model.weights.headers.manifest import MANIFEST, read_manifest, wrong_digests, wrong_sizes


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``vl3train verify-checkpoint``."""
    parser.add_argument("folder", type=Path, help="a run's output folder, or one of its checkpoints")


def main(args: Namespace) -> int:
    """Check each checkpoint; returns 1 when one is damaged, else 0."""
    console = Console(highlight=False, soft_wrap=True)
    folders = checkpoints_of(args.folder)
    return int(any([show(folder, console) for folder in folders]))


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints that ``folder`` means, oldest first; before those of adapters the weights that they are on.

    Raises ValueError where there is none.
    """
    if (folder / MANIFEST).is_file() or folder.name.startswith("step_"):
        return [folder]
    for inside in (folder / "checkpoints", folder):
        if found := sorted(inside.glob("step_????????")):
            base = folder / "base"
            return [base, *found] if (base / MANIFEST).is_file() else found
    raise ValueError(f"{folder} holds no checkpoint: name a run's output folder, or one of its checkpoints")


def show(folder: Path, console: Console) -> bool:
    """Print what is wrong with a checkpoint, or that it is whole; returns whether something is wrong."""
    try:
        sizes, digests = read_manifest(folder)
    except ValueError as error:
        console.print(f"{folder}: damaged: {error}", markup=False)
        return True
    found = wrong_sizes(folder, sizes)
    missing = {line.partition(" has ")[0] for line in found}
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(folder.name, total=sum(sizes.values()))
        for name, size in sizes.items():
            if name not in missing:
                found += wrong_digests(folder, digests, [name])
            bar.advance(task, size)
    if found:
        console.print(f"{folder}: damaged", markup=False)
        for line in found:
            console.print(f"  {line}", markup=False)
    elif digests:
        console.print(f"{folder}: whole, {len(sizes)} files, {sum(sizes.values()):,} bytes", markup=False)
    else:
        what = "all files have their size; it was written before 2026-12, without digests"
        console.print(f"{folder}: {what}", markup=False)
    return bool(found)
