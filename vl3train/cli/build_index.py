"""Build the index of a recipe: where each sample is, its tokens and patches, its checksum.

Training builds a missing index itself. For a large recipe, build it before, on any machine without a GPU. The command
keeps what is finished: after a stop it resumes, and it measures only shards that are new or changed. Stages that
render samples in the same way share an index.

examples:
  vl3train index stage=1 model=2b data.root=/data
  vl3train index stage=4 model=2b stage.init_from=runs/2b/3_multitask_finetuning data.num_workers=16
  vl3train index stage=3 model=2b stage.init_from=runs/2b/2_alignment --store-frames /data/frames
  vl3train index stage=1 model=2b data.root=/data data.num_workers=16 --decode
"""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from vl3train.config.load import add_config_arguments, load_config
from vl3train.config.paths import tokenizer_source

if TYPE_CHECKING:
    from vl3train.data.loader import OpenData


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``vl3train index``."""
    add_config_arguments(parser)
    parser.add_argument(
        "--store-frames",
        type=Path,
        metavar="FOLDER",
        help="first write shards that hold the sampled frames instead of the clips, and FOLDER/recipe.yaml, a "
        "recipe of them; reading a stored frame is about 70 times cheaper than decoding 720p video",
    )

    parser.add_argument(
        "--index-dir",
        metavar="FOLDER",
        help="where the indexes are written, the same as data.index_dir=FOLDER; training needs that option too",
    )
    parser.add_argument(
        "--decode",
        action="store_true",
        help="also decode every picture and clip whole: damage inside compressed data, which leaves a file whole, is "
        "found now and does not fail in the run (a stage that prunes frames decodes its clips in any case); slower: "
        "one core takes about 150 pictures of 1024x768 a second, not 1000",
    )


def main(args: Namespace) -> int:
    """Index training and held-out samples, and print how many there are and which are rejected."""
    from vl3train.data.pipeline import open_data, store_frames
    from vl3train.model.weights.processor import build_processor

    overrides = [*args.overrides, *([f"data.index_dir={args.index_dir}"] if args.index_dir else [])]
    cfg = load_config(overrides, config_file=args.config, config_dir=args.config_dir)
    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as tokenizer_dir:
        # The tokenizer exactly as a run writes it: the index holds its checksum.
        build_processor(tokenizer_source(cfg)).save_pretrained(tokenizer_dir)
        if args.store_frames is not None:
            with _progress() as show:
                recipe = store_frames(
                    cfg, args.store_frames, tokenizer_dir=Path(tokenizer_dir), progress=show
                )
            console.print(f"frames are stored; train on them with data.recipe={recipe}", markup=False)
            cfg = load_config(
                [*overrides, f"data.recipe={recipe}"],
                config_file=args.config,
                config_dir=args.config_dir,
            )
        for held_out in (False, True):
            with _progress() as show:
                data = open_data(
                    cfg,
                    tokenizer_dir=Path(tokenizer_dir),
                    held_out=held_out,
                    build=True,
                    decode=args.decode,
                    progress=show,
                )
            for line in data.changed:
                console.print(line, markup=False)
            print_samples(console, data, "held-out" if held_out else "training")
    return 0


def print_samples(console: Console, data: OpenData, split: str) -> None:
    """What an index holds of each source, and what is rejected."""
    from vl3train.data.prepare.rejections import Rejection, describe_rejected, what_is_odd

    index, table = data.index, data.plan.table
    console.print(f"{split} samples, index {index.fingerprint}:")
    first = 0
    for name, size in zip(index.source_names, index.sizes, strict=True):
        tokens = int(table.num_tokens[first : first + size].sum())
        console.print(f"  {name}: {size:,} samples, {tokens:,} tokens")
        first += size
    for name, suffix, count in index.ignored_members:
        console.print(f"  {name}: {count:,} files of kind .{suffix} are ignored", markup=False)
    for name, remark, count in index.remarks:
        console.print(f"  {name}: {count:,} samples with {what_is_odd(remark)}", markup=False)
    too_large = [(index.key(row), "larger than a pack") for row in data.plan.oversized_samples]
    for what, listed in (("are rejected", index.rejected), ("do not fit into a pack", too_large)):
        if listed:
            console.print(f"  {len(listed):,} {what}:")
            for line in describe_rejected([Rejection(*one) for one in listed]):
                console.print(f"  {line}", markup=False)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each source; the function takes the source's name, samples done and samples in all."""
    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*bars, console=Console(stderr=True)) as progress:
        tasks: dict[str, TaskID] = {}

        def show(source: str, done: int, total: int) -> None:
            if source not in tasks:
                tasks[source] = progress.add_task(source)
            progress.update(tasks[source], completed=done, total=total)

        yield show
