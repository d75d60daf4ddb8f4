"""Write annotations and their media into webdataset shards: the .tar files that training reads.

Annotations are files of records: LLaVA, VideoLLaMA3, ShareGPT, OpenAI-style `messages`, Alpaca, ms-swift, tables of
questions and answers, captions of COCO, questions and answers of VQA; as .json, .jsonl, .csv, .tsv (also .gz, .zst),
.parquet, .arrow, a folder, or hf:NAME:SPLIT. The command checks every record before it writes the first one. It copies
media byte for byte and never overwrites a folder.

examples:
  vl3train shards chat.jsonl --media-root /data/raw --check
  vl3train shards chat.jsonl --media-root /data/raw --check --decode
  vl3train shards chat.jsonl --media-root /data/raw --out data/chat
  vl3train shards a.json b.jsonl --media-root /data/raw --media-root /data/more --out data/mix --skip-rejected
  vl3train shards qa.parquet --columns picture=image question=user answer=assistant --out data/qa
  vl3train shards caption:coyo.parquet --media-root /data/raw --out data/coyo
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vl3train.cli.arguments import FormerName, count

if TYPE_CHECKING:
    from vl3train.data.prepare.annotated_records import AnnotatedRecords
    from vl3train.data.prepare.check_media import MediaCheck


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``vl3train shards``."""
    from vl3train.data.records.importers import IMPORTERS

    forms = [
        f"  {name + ':':<11} {str(read.__doc__).partition(chr(10))[0]}" for name, read in IMPORTERS.items()
    ]
    parser.epilog = "\n".join(["importers, written before the file, as in caption:FILE:", *forms])
    parser.add_argument("annotations", nargs="+", metavar="ANNOTATIONS", help="files or data sets of records")
    parser.add_argument("--out", type=Path, help="folder to write; it must not exist, or must be empty")
    parser.add_argument(
        "--check", action="store_true", help="report what is wrong with the records and write nothing"
    )
    parser.add_argument(
        "--media-root",
        type=Path,
        action="append",
        metavar="FOLDER",
        help="folder that paths in records start from, and that no medium may lie outside of (default .); may be given "
        "several times",
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        type=_column,
        metavar="COLUMN=MEANING",
        help="what each column holds: image, video, system, user, assistant, conversations, messages, or ignore; "
        "columns that are not named keep their names",
    )
    parser.add_argument(
        "--chosen-only",
        action="store_true",
        help="train on the chosen answer of preference data; without it such records are rejected",
    )
    parser.add_argument(
        "--decode",
        action="store_true",
        help="also decode every picture and clip whole; without it, damage inside compressed data, which leaves a file "
        "whole, is found by `vl3train index --decode` or in the run; one core decodes about 200 pictures of "
        "1024x768 a second, and checks 1000",
    )
    parser.add_argument(
        "--skip-rejected", action="store_true", help="write the good records although others are rejected"
    )
    parser.add_argument("--skip-bad", action=FormerName, now="--skip-rejected")
    parser.add_argument(
        "--share-media",
        action="store_true",
        help="write media once for the records that show them behind the same text, as one sample of several records; "
        "with data.share_prefix=true they are trained on together (docs/families.md)",
    )
    parser.add_argument(
        "--samples-per-shard",
        type=count,
        default=1000,
        metavar="N",
        help="most samples of a shard (default 1000)",
    )
    parser.add_argument(
        "--bytes-per-shard",
        type=count,
        default=1_000_000_000,
        metavar="N",
        help="a shard is closed after this many bytes (default 1e9)",
    )


def main(args: Namespace) -> int:
    """Write the shards, or check the records. Returns 1 when records are rejected, unless --skip-rejected is given."""
    from vl3train.data.prepare.rejections import (
        REJECTED_FILE,
        RejectedRecordsError,
        describe_ignored,
        describe_rejected,
        describe_remarks,
    )
    from vl3train.data.prepare.write_shards import write_shards

    if args.check:
        return check(args)
    if args.out is None:
        raise ValueError("--out FOLDER is missing; give the folder to write, or --check to write nothing")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bars, console=console) as progress:
        tasks = {what: progress.add_task(what, total=None) for what in ("checking", "writing")}
        counts = dict.fromkeys(tasks, 0)

        def show(what: str, count: int) -> None:
            counts[what] = count
            progress.update(tasks[what], completed=count)
            if what == "writing" and count == 1:  # now the number of records is known, rejected ones included
                for task in tasks.values():
                    progress.update(task, total=counts["checking"])

        try:
            report = write_shards(
                _records(args),
                args.out,
                max_samples=args.samples_per_shard,
                max_bytes=args.bytes_per_shard,
                skip_rejected=args.skip_rejected,
                progress=show,
                media_check=_media_check(args),
                share_media=args.share_media,
            )
        except RejectedRecordsError as problems:
            progress.stop()
            print(problems, file=sys.stderr)
            if len(problems.rejected) < problems.num_records:
                print(
                    "Nothing was written. Correct these records, or write the others with --skip-rejected.",
                    file=sys.stderr,
                )
            return 1
    print(f"{args.out}: {report.num_written} samples in {report.num_shards} shards")
    if report.rejected:
        print(f"{len(report.rejected)} records were rejected, listed in {args.out / REJECTED_FILE}:")
        print("\n".join(describe_rejected(report.rejected)))
    for line in (*describe_ignored(report.ignored), *describe_remarks(report.remarks)):
        print(line)
    return 0


def check(args: Namespace) -> int:
    """Print every kind of fault with its count and first examples. Returns 1 when there is one. Writes nothing."""
    from vl3train.data.prepare.rejections import describe_ignored, describe_rejected, describe_remarks
    from vl3train.data.prepare.write_shards import check_annotations

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    bars = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bars, console=console) as progress:
        task = progress.add_task("checking", total=None)
        report = check_annotations(
            _records(args),
            progress=lambda what, count: progress.update(task, completed=count),
            media_check=_media_check(args),
        )
    num_usable = report.num_records - len(report.rejected)
    print(
        f"{report.num_records} records, {num_usable} can be written, {len(report.rejected)} are rejected",
        *describe_rejected(report.rejected),
        *describe_ignored(report.ignored),
        *describe_remarks(report.remarks),
        sep="\n",
    )
    return int(bool(report.rejected))


def _records(args: Namespace) -> AnnotatedRecords:
    from vl3train.data.prepare.annotated_records import AnnotatedRecords

    columns = dict(args.columns) if args.columns else None
    roots = tuple(args.media_root or [Path()])
    return AnnotatedRecords(tuple(args.annotations), roots, columns, args.chosen_only)


def _media_check(args: Namespace) -> MediaCheck:
    """How media are checked: with the default options of a run, in one process for each core."""
    from vl3train.config.data_options import DataConfig
    from vl3train.contracts.records import RenderSettings
    from vl3train.data.media.clips import DecodeLimits
    from vl3train.data.prepare.check_media import MediaCheck

    data = DataConfig()
    settings = RenderSettings(
        image_merge_size=1,
        video_merge_size=2,
        prune_frames=False,
        fps=data.fps,
        min_frames=data.min_frames,
        max_frames=data.max_frames,
        image_min_pixels=data.image_min_pixels,
        image_max_pixels=data.image_max_pixels,
        video_min_pixels=data.video_min_pixels,
        video_max_pixels=data.video_max_pixels,
        max_visual_tokens=data.max_visual_tokens,
        tokenizer="",  # nothing is rendered
    )
    limits = DecodeLimits(max_pixels=data.decode_max_pixels, max_seconds=data.decode_max_seconds)
    return MediaCheck(
        settings, limits, data.decode_seconds, num_workers=os.cpu_count() or 1, decode=args.decode
    )


def _column(text: str) -> tuple[str, str]:
    column, equals, meaning = text.partition("=")
    if not equals:
        raise ArgumentTypeError(f"{text!r} is not COLUMN=MEANING")
    return column, meaning
