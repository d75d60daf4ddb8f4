"""Show one step of a run before it runs: its samples, packs and ranks, with pictures and text.

The command prints a table and writes one HTML page. Words that the loss is computed on are green. The recipe must
have an index: run `vl3train index` first. For a run that has started, --config RUN/config.yaml shows any step of it.
Of a step that the run skipped, because its loss or gradient norm was bad, it shows the samples with their losses.

examples:
  vl3train inspect step=1 stage=1 model=debug data=demo machine=cpu
  vl3train inspect step=1200 --config runs/2b/3_multitask_finetuning/config.yaml --out step1200.html
  vl3train inspect --dump runs/2b/3_multitask_finetuning/bad_steps/step_00001200.json
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vl3train.cli.arguments import count, split_step
from vl3train.config.load import add_config_arguments
from vl3train.contracts.bad_step import dump_path, read_bad_step
from vl3train.preview.check_config import opened
from vl3train.preview.inspect_page import step_page
from vl3train.preview.step_samples import ShownSample, ShownStep, shown_step

TEXT_SHOWN = 300
"""Characters of a sample's text in the terminal; the page has all of it."""


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``vl3train inspect``."""
    add_config_arguments(parser)
    parser.add_argument(
        "--samples", type=count, default=8, metavar="N", help="samples shown of each pack (default 8)"
    )
    parser.add_argument(
        "--dump", type=Path, metavar="JSON", help="a step that a run skipped: RUN/bad_steps/step_*.json"
    )
    parser.add_argument("--out", type=Path, metavar="HTML", help="file to write (default step-N.html)")


def main(args: Namespace) -> int:
    """Print the table and write the page; returns 1 when one of its samples cannot be used, else 0."""
    args.overrides, number = split_step(args.overrides)
    bad = None
    if args.dump is not None:
        bad = read_bad_step(args.dump)
        if number not in (None, bad.step):
            raise ValueError(f"step={number}: {args.dump} is about step {bad.step}; leave step=N out")
        number = bad.step
        args.config = args.config or args.dump.absolute().parents[1] / "config.yaml"
    if number is None:
        raise ValueError("which step? add step=N; the first is step=1")
    with opened(args) as (cfg, data):
        kept = dump_path(Path(cfg.run.output_dir), number)
        if bad is None and kept.exists() and (found := read_bad_step(kept)).step == number:
            bad = found
        step = shown_step(cfg, data, number, args.samples, bad)
    out = args.out or Path(f"step-{number}.html")
    out.write_text(step_page(step), encoding="utf-8")
    console = Console(highlight=False, soft_wrap=True)
    print_step(console, step)
    console.print(f"page: {out}")
    return int(any(sample.fault for shown in step.packs for sample in shown.samples))


def print_step(console: Console, step: ShownStep) -> None:
    """The packs as a table, then the text of their samples."""
    console.print(Text(step.title, style="bold"))
    for fact in step.facts:
        console.print(fact)
    table = Table()
    table.add_column("rank")
    table.add_column("micro-batch")
    for name in ("samples", "tokens", "fill", "patches", "fill", "supervised", "work / mean"):
        table.add_column(name, justify="right")
    for shown in step.packs:
        pack = shown.place.pack
        table.add_row(
            str(shown.place.rank),
            str(shown.place.micro_batch),
            f"{len(pack.samples)}",
            f"{pack.num_tokens:,}",
            f"{shown.token_fill:.1%}",
            f"{pack.num_patches:,}",
            f"{shown.patch_fill:.1%}",
            f"{pack.num_supervised_tokens:,}",
            f"{shown.work:.3f}",
        )
    console.print(table)
    for shown in step.packs:
        console.print(Text(f"rank {shown.place.rank}, micro-batch {shown.place.micro_batch}", style="bold"))
        for sample in shown.samples:
            console.print(Text(f"  {sample.key}  {sample.about}"))
            if sample.loss is not None:
                console.print(Text(f"    {sample.loss}", style="" if sample.loss.is_finite else "red"))
            if sample.fault:
                console.print(Text(f"    cannot be used: {sample.fault}", style="red"))
            console.print(_text(sample))


def _text(sample: ShownSample) -> Text:
    line, left = Text("    "), TEXT_SHOWN
    for piece in sample.text:
        words = f"[{piece.count} visual tokens]" if piece.count else piece.text.replace("\n", "⏎")
        line.append(words[:left], style="green" if piece.supervised else "blue" if piece.count else "dim")
        left -= len(words)
        if left <= 0:
            line.append(" …")
            break
    return line
