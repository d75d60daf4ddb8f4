"""Fine-tune a model on your own records, in one command: data, training, held-out figures, answers, report.

It reads every form of records that `vl3train shards` reads, holds out samples by their pictures and clips, writes
run.yaml, trains adapters (LoRA) on the language model on all GPUs, or on the CPU without one, keeps the checkpoint with
the best held-out loss, and answers held-out questions with it. Given again, it resumes, or says that it is finished.

examples:
  vl3train finetune my.jsonl --model VideoLLaMA3-2B --dry-run
  vl3train finetune my.jsonl --model VideoLLaMA3-2B --media-root /data/media --out runs/mine
  vl3train finetune a.jsonl b.parquet --model VideoLLaMA3-2B --held-out test.jsonl --epochs 5 --lr 2e-4
  vl3train finetune my.jsonl --model VideoLLaMA3-2B --full --parts projector language_model
  vl3train finetune my.jsonl --model VideoLLaMA3-2B --lr 1e-4,3e-4 adapter.rank=16,64
  vl3train finetune --config runs/mine/run.yaml run.num_epochs=6

Where an option has several values, each combination is a run of its own on the same data, one after the other, in a
folder below --out; a table and results.csv say what they reached.
"""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from vl3train.cli.arguments import positives
from vl3train.config.input.sweeps import has_several_values


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``vl3train finetune``."""
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RECORDS | key=value",
        help="files of records, and options as step.max_tokens=8192",
    )
    parser.add_argument("--model", metavar="DIR_OR_NAME", help="folder of the model, or its name on the hub")
    parser.add_argument(
        "--media-root",
        action="append",
        default=[],
        metavar="FOLDER",
        help="folder that paths in records start from, and that no medium may lie outside of (default: the folder you "
        "are in, and those of the records' files); may be given several times",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder for everything that is written (default: runs/NAME)"
    )
    parser.add_argument(
        "--held-out",
        metavar="SHARE|N|FILE",
        help="samples to evaluate on, which are not trained on (default: 5%%)",
    )
    parser.add_argument(
        "--epochs", type=positives, default=(), help="passes over the data (default: 3); several: 2,4"
    )
    parser.add_argument(
        "--lr",
        type=positives,
        default=(),
        help="learning rate of all that trains (default: 1e-4 of adapters); several: 1e-4,3e-4",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--full", action="store_true", help="train all weights, without adapters")
    how.add_argument(
        "--qlora", action="store_true", help="adapters on weights of 4 bits: less GPU memory, slower"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        default=[],
        metavar="PART",
        help="what trains: vision_encoder, projector, language_model (default: language_model; with --full, all)",
    )
    parser.add_argument(
        "--skip-rejected", action="store_true", help="train although records are rejected: on the others"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="make the data, show the plan, and train nothing"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a run.yaml, in place of all of the above"
    )


def main(args: Namespace) -> int:
    """Prepare, show the plan, train; returns the exit code of `vl3train train`."""
    overrides = [word for word in args.words if is_override(word)]
    records = [word for word in args.words if not is_override(word)]
    check_words(args, records)

    from vl3train.finetuning.flow import prepare, prepare_file, run
    from vl3train.finetuning.wish import Wish
    from vl3train.sweeps.finetune import prepare_sweep, sweep

    runs = None
    overrides += several("optim.learning_rate", args.lr) + several("run.num_epochs", args.epochs)

    if args.config is not None:
        prepared = prepare_file(args.config, overrides, tell)
    else:
        wish = Wish(
            records=tuple(records),
            model=args.model,
            out=args.out,
            media_roots=tuple(args.media_root),
            held_out=args.held_out,
            full=args.full,
            qlora=args.qlora,
            parts=tuple(args.parts),
            epochs=args.epochs[0] if len(args.epochs) == 1 else None,
            rate=args.lr[0] if len(args.lr) == 1 else None,
            overrides=tuple(overrides),
            skip_rejected=args.skip_rejected,
        )
        if has_several_values(overrides):
            prepared, runs = prepare_sweep(wish, tell)
        else:
            prepared = prepare(wish, tell)
    for line in prepared.plan:
        tell(line)
    for one in runs or []:
        tell(f"run       {one.folder}")
    if args.dry_run:
        command = f"vl3train finetune --config {shlex.quote(str(prepared.run_file))}"
        tell(f"nothing is trained (--dry-run); {prepared.run_file} has the options. To train: {command}")
        return 0
    return run(prepared, tell) if runs is None else sweep(prepared, runs, tell)


def several(key: str, values: Sequence[float]) -> list[str]:
    """The word that gives an option several values; none for one value or none.

    >>> several("run.num_epochs", [2, 4]), several("run.num_epochs", [2])
    (['run.num_epochs=2,4'], [])
    """
    return [f"{key}={','.join(f'{value:g}' for value in values)}"] if len(values) > 1 else []


def is_override(word: str) -> bool:
    """Whether a word is key=value, or ~key, and no file that is called so."""
    return ("=" in word or word.startswith("~")) and not Path(word).exists()


def check_words(args: Namespace, records: list[str]) -> None:
    """Raise ValueError where the words say too little, or the same twice."""
    given = {
        "RECORDS": records,
        "--model": args.model,
        "--media-root": args.media_root,
        "--out": args.out,
        "--held-out": args.held_out,
        "--epochs": args.epochs,
        "--lr": args.lr,
        "--full": args.full,
        "--qlora": args.qlora,
        "--parts": args.parts,
        "--skip-rejected": args.skip_rejected,
    }
    if args.config is not None:
        if twice := [name for name, value in given.items() if value]:
            raise ValueError(
                f"--config {args.config} says what is trained; leave {', '.join(twice)} out, edit the file, or write "
                "key=value (`vl3train options WORD` finds the option)"
            )
        return
    if missing := [name for name in ("RECORDS", "--model") if not given[name]]:
        raise ValueError(
            f"{' and '.join(missing)} must be given: vl3train finetune my.jsonl --model DIR_OR_NAME"
        )


def tell(line: str) -> None:
    """A line for the person, at once: the training's own lines come from another process."""
    print(line, file=sys.stdout, flush=True)
