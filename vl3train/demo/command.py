"""``vl3train demo OUT``: draws the demo's data and makes the debug model's two parts. It never overwrites."""

from __future__ import annotations

import dataclasses
import json
import os
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vl3train.contracts.files import whole_folder, write_whole
from vl3train.contracts.strict_json import json_text
from vl3train.demo.build import (
    QUESTIONS_FILE,
    draw_questions,
    missing_folders,
    write_missing,
    write_questions,
)
from vl3train.demo.questions import TASKS

MANIFEST = "demo.json"
RULES = 1
"""Increased when the same seed gives other samples or parts."""


def add_arguments(parser: ArgumentParser) -> None:
    """The command line of ``vl3train demo``."""
    parser.add_argument("out", type=Path, help="folder for shards and parts; configs expect `demo`")
    parser.add_argument("--seed", type=int, default=0, help="decides every sample (default 0)")
    parser.add_argument(
        "--samples-scale", type=float, default=1.0, help="1 is the full demo, 0.1 a tenth of its samples"
    )
    parser.add_argument(
        "--parts",
        action=BooleanOptionalAction,
        default=True,
        help="also make the debug model's encoder, language model and tokenizer (the default)",
    )


def main(args: Namespace) -> int:
    """Make what is missing below ``args.out``; returns 0.

    Raises:
        ValueError: the folder holds a demo of another seed or size, or something else.
    """
    out: Path = args.out
    if not 0 < args.samples_scale < float("inf"):
        raise ValueError(f"--samples-scale {args.samples_scale} must be a number above 0")
    claim_folder(out, {"rules": RULES, "seed": args.seed, "samples_scale": args.samples_scale})
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        missing = missing_folders(out)
        if missing:
            bar = bars.add_task("drawing", total=len(missing))

            def drawn(name: str, samples: int) -> None:
                bars.update(bar, advance=1)
                bars.console.print(f"  {name}: {samples} samples")

            num_processes = min(len(missing), os.cpu_count() or 1)
            write_missing(out, args.seed, args.samples_scale, num_processes, drawn)
        else:
            console.print(f"{out}: all {2 * len(TASKS)} shard folders exist already and are not changed")
        if not (out / QUESTIONS_FILE).is_file():
            write_questions(out, args.seed, args.samples_scale)
        if args.parts and (out / "parts").is_dir():
            console.print(f"{out / 'parts'}: exists already and is not changed")
        elif args.parts:
            make_parts(out, args.seed, args.samples_scale, bars)
    console.print(f"{out}: the demo is complete (seed {args.seed})")
    return 0


def claim_folder(out: Path, wanted: dict[str, float]) -> None:
    """Record in ``out`` which demo it holds, or raise ValueError when it holds something else."""
    manifest = out / MANIFEST
    way_out = f"choose another folder, or delete {out} if you no longer need it"
    if manifest.is_file():
        found = json.loads(manifest.read_text(encoding="utf-8"))
        if found != wanted:
            differing = ", ".join(
                f"{key} is {found.get(key)} there and {wanted.get(key)} here"
                for key in sorted(found.keys() | wanted.keys())
                if found.get(key) != wanted.get(key)
            )
            raise ValueError(f"{out} holds another demo: {differing}; {way_out}")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not a demo folder (it has no {MANIFEST}); {way_out}")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(manifest, json_text(wanted) + "\n")


def make_parts(out: Path, seed: int, scale: float, bars: Progress) -> None:
    """Make ``out/parts``; the folder appears when it is complete."""
    # Imported here: torch and transformers take seconds, which drawing alone does not need.
    import torch
    from transformers.utils.logging import disable_progress_bar

    from vl3train.demo.parts import PartSizes, make_debug_parts

    questions = [question for source in TASKS for question in draw_questions(source, seed, scale)[0]]
    disable_progress_bar()  # one bar is enough
    sizes = PartSizes()
    if scale < 1:  # a small demo only shows that everything runs
        sizes = dataclasses.replace(sizes, steps=max(1, round(sizes.steps * scale)))
    # For matrices this small, one thread is faster than two that wait for each other.
    torch.set_num_threads(1)
    bar = bars.add_task("language model on the demo's text", total=sizes.steps)

    def trained(step: int, loss: float) -> None:
        bars.update(bar, completed=step, description=f"language model on the demo's text, loss {loss:.2f}")

    with whole_folder(out / "parts") as partial:
        make_debug_parts(partial, questions, seed, sizes, trained)
