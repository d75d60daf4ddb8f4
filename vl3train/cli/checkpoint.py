"""List a run's checkpoints: step, size, state of their files, ranks and ZeRO stage of the run that saved them.

A run goes on from any of them with another number of ranks or another ZeRO stage: give the train command with the new
machine. The list compares sizes. --read reads every file and compares its digest; --keep reads the newest before it
deletes another. The command needs no GPU and no torch to list. It returns 1 where a checkpoint is damaged, else 0.

examples:
  vl3train checkpoint runs/2b/2_alignment
  vl3train checkpoint runs/2b/2_alignment --read
  vl3train checkpoint runs/2b/2_alignment --keep 1
  vl3train checkpoint s3://bucket/runs/mine --fetch runs/mine
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vl3train.cli.verify_checkpoint import checkpoints_of
from vl3train.contracts.redaction import shown_address
from vl3train.engine.checkpoints.listing import Listed, list_checkpoint


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``vl3train checkpoint``."""
    parser.add_argument(
        "folder",
        help="a run's output folder, or one of its checkpoints; with --fetch what run.upload_to names",
    )
    parser.add_argument(
        "--fetch",
        type=Path,
        metavar="DIR",
        help="bring the newest whole checkpoint, and what the run wrote beside it, into DIR: the train command with "
        "run.output_dir=DIR goes on from there",
    )
    parser.add_argument("--read", action="store_true", help="read every file and compare its digest")
    parser.add_argument(
        "--keep",
        type=int,
        metavar="N",
        help="delete all but the newest N, the best, and those that run.keep_every_steps keeps",
    )


def fetch(address: str, run: Path, console: Console) -> int:
    """Bring a run's newest checkpoint from where it was copied. Raises ValueError where that cannot be done."""
    from vl3train.engine.mirror.remote import Mirror, MirrorError  # it imports torch

    try:
        with console.status("looking") as status:
            name = Mirror(address).get(run, lambda file: status.update(f"copying {file}"))
    except MirrorError as error:
        raise ValueError(str(error)) from None
    console.print(f"{run} has {name}: give the train command with run.output_dir={run}", markup=False)
    return 0


def main(args: Namespace) -> int:
    """Print the list, delete what was asked for; returns 1 where one is damaged, else 0.

    Raises ValueError where there is no checkpoint, or where --keep cannot be done.
    """
    console = Console(highlight=False, soft_wrap=True)
    if args.fetch is not None:
        return fetch(args.folder, args.fetch, console)
    if "://" in args.folder:
        raise ValueError(
            f"{shown_address(args.folder)} is elsewhere: bring its newest checkpoint with --fetch DIR"
        )
    args.folder = Path(args.folder)
    if args.keep is not None and args.keep < 1:
        raise ValueError(f"--keep {args.keep}: the newest stays at least, so 1 or more")
    listed = [list_checkpoint(folder, read=args.read) for folder in checkpoints_of(args.folder)]
    if args.keep is not None:
        if listed[0].folder.parent != args.folder / "checkpoints":
            raise ValueError(f"--keep: {args.folder} is no output folder of a run; name that")
        from vl3train.engine.checkpoints.prune import prune, read_newest  # it imports torch

        listed = read_newest(listed)
        for one in prune(args.folder, listed, args.keep):
            console.print(f"deleted {one.folder}: {one.num_bytes / 2**30:.2f} GiB", markup=False)
            listed.remove(one)
    console.print(table_of(listed))
    for one in listed:
        for line in one.found:
            console.print(f"{one.folder}: {line}", markup=False)
    return int(any(one.found for one in listed))


def table_of(listed: list[Listed]) -> Table:
    """One row for each checkpoint, oldest first."""
    table = Table(box=None, header_style="bold")
    for name in ("step", "GiB", "files", "ranks", "ZeRO", "dtype", "a start has"):
        table.add_column(name, justify="right" if name in ("step", "GiB", "ranks", "ZeRO") else "left")
    for one in listed:
        options = [
            str(one.saved_by.get(name, "?"))
            for name in ("machine.dp_size", "machine.zero_stage", "machine.dtype")
        ]
        table.add_row(str(one.step), f"{one.num_bytes / 2**30:.2f}", one.state, *options, one.starts)
    return table
