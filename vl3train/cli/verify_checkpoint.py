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

from vl3train.model.weights.headers.manifest import (
    MANIFEST,
    checkpoints_in,
    read_manifest,
    wrong_digests,
    wrong_sizes,
)
from vl3train.model.weights.headers.run_files import base_remark, fault_of_manifest


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``vl3train verify-checkpoint``."""
    parser.add_argument("folder", type=Path, help="a run's output folder, or one of its checkpoints")


def main(args: Namespace) -> int:
    """Check each checkpoint; returns 1 when one is damaged, else 0."""
    console = Console(highlight=False, soft_wrap=True)
    folders = checkpoints_of(args.folder)
    found = [show_base(base, folders[-1], console)] if (base := base_of(folders[-1])) else []
    return int(any([*found, *(show(folder, console) for folder in folders)]))


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints that ``folder`` means, oldest first.

    Raises ValueError where there is none.
    """
    if (folder / MANIFEST).is_file() or folder.name.startswith("step_"):
        return [folder]
    for inside in (folder / "checkpoints", folder):
        if found := list(checkpoints_in(inside).values()):
            return found
    raise ValueError(f"{folder} holds no checkpoint: name a run's output folder, or one of its checkpoints")


def base_of(checkpoint: Path) -> Path | None:
    """The weights that the adapters of a run's checkpoint are on; None of one without adapters."""
    base = checkpoint.absolute().parent.parent / "base"
    return base if base.is_dir() and (checkpoint / "adapter").is_dir() else None


def show_base(base: Path, checkpoint: Path, console: Console) -> bool:
    """The same as ``show`` of the weights under adapters."""
    if remark := base_remark(base, checkpoint):
        console.print(remark, markup=False)
        return False
    if fault := fault_of_manifest(base, checkpoint):
        console.print(f"{base}: damaged: {fault}", markup=False)
        return True
    return show(base, console)


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
