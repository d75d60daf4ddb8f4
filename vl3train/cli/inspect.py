"""Show one step of a run before it runs: which samples, in which packs, on which ranks; pictures and text.

Prints a table and writes one HTML page. What the loss is taken on is green there. The recipe must be indexed:
`vl3train index`. An interrupted run's folder shows any of its steps with --config RUN/config.yaml.

examples:
  vl3train inspect step=0 stage=1 model=debug data=demo machine=cpu
  vl3train inspect step=1200 --config runs/2b/3_multitask_finetuning/config.yaml --out step1200.html
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vl3train.cli.arguments import count
from vl3train.config.load import add_config_arguments
from vl3train.contracts.records import SampleError
from vl3train.preview.inspect_page import ShownPack, ShownSample, step_page
from vl3train.preview.opened import opened, split_step
from vl3train.preview.step_samples import (
    Place,
    data_address,
    decoding,
    rendered,
    sample_pictures,
    step_places,
    text_pieces,
)

if TYPE_CHECKING:
    from vl3train.data.loader import OpenData
    from vl3train.data.render.chat_tokens import ChatTokenizer
    from vl3train.data.render.decode_client import Decoder

TEXT_SHOWN = 300
"""Characters of a sample's text in the terminal; the page has all of it."""


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``vl3train inspect``."""
    add_config_arguments(parser)
    parser.add_argument(
        "--samples", type=count, default=8, metavar="N", help="shown of each pack (default 8)"
    )
    parser.add_argument("--out", type=Path, metavar="HTML", help="the page (default step-N.html)")


def main(args: Namespace) -> int:
    """Print the table, write the page; 1 where a sample of it cannot be used."""
    from vl3train.data.render.chat_tokens import ChatTokenizer

    args.overrides, step = split_step(args.overrides)
    if step is None:
        raise ValueError("which step? add step=N, counted from 0")
    console = Console(highlight=False, soft_wrap=True)
    with opened(args) as (cfg, data):
        num_steps = cfg.run.num_steps or data.plan.total_steps(cfg.run.num_epochs)
        if step >= num_steps:
            raise ValueError(f"step={step}: the run has {num_steps} steps, 0 to {num_steps - 1}")
        tokenizer = ChatTokenizer.from_folder(data.tokenizer_dir)
        cursor = data.plan.cursor_at(step)
        places = step_places(data.plan.step_packs(cursor), cfg.machine.dp_size)
        with decoding(data) as decoder:
            packs = [shown_pack(data, tokenizer, decoder, place, places, args.samples) for place in places]
        title = f"{cfg.stage.name}, step {step}"
        facts = [
            f"virtual epoch {cursor.epoch}, step {cursor.step_in_epoch} of {data.plan.steps_in_epoch(cursor.epoch)} "
            f"in it; plan {data.plan.fingerprint}",
            f"{sum(len(place.pack.samples) for place in places)} samples, "
            f"{sum(place.pack.num_tokens for place in places):,} tokens, "
            f"{sum(place.pack.num_supervised_tokens for place in places):,} of them supervised, on "
            f"{cfg.machine.dp_size} ranks",
        ]
    out = args.out or Path(f"step-{step}.html")
    out.write_text(step_page(title, facts, packs), encoding="utf-8")
    print_step(console, title, facts, packs)
    console.print(f"page: {out}")
    return int(any(sample.fault for shown in packs for sample in shown.samples))


def shown_pack(
    data: OpenData, tokenizer: ChatTokenizer, decoder: Decoder, place: Place, places: list[Place], most: int
) -> ShownPack:
    """A pack with its first samples rendered."""
    limits, pack = data.plan.step, place.pack
    mean = sum(other.pack.cost for other in places) / len(places)
    return ShownPack(
        place=place,
        token_fill=pack.num_tokens / limits.max_tokens,
        patch_fill=pack.num_patches / limits.max_patches,
        work=pack.cost / mean,
        samples=[shown_sample(data, row, tokenizer, decoder) for row in pack.samples[:most]],
    )


def shown_sample(data: OpenData, row: int, tokenizer: ChatTokenizer, decoder: Decoder) -> ShownSample:
    """A sample with its pictures and text, or with the reason why it has none."""
    lengths = data.index.lengths(row)
    about = (
        f"{lengths.modality}: {lengths.num_tokens:,} tokens, {lengths.num_supervised_tokens:,} supervised, "
        f"{lengths.num_patches:,} patches, {lengths.num_visual_tokens:,} visual tokens"
    )
    key, sample = data.index.key(row), rendered(data, row, decoder)
    if isinstance(sample, SampleError):
        return ShownSample(key=key, about=about, text=[], pictures=[], fault=str(sample))
    pictures = [[data_address(frame) for frame in item] for item in sample_pictures(sample)]
    return ShownSample(
        key=key, about=about, text=text_pieces(sample, tokenizer), pictures=pictures, fault=None
    )


def print_step(console: Console, title: str, facts: list[str], packs: list[ShownPack]) -> None:
    """The packs as a table, then the text of their samples."""
    console.print(Text(title, style="bold"))
    for fact in facts:
        console.print(fact)
    table = Table()
    table.add_column("rank")
    table.add_column("micro-batch")
    for name in ("samples", "tokens", "fill", "patches", "fill", "supervised", "work / mean"):
        table.add_column(name, justify="right")
    for shown in packs:
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
    for shown in packs:
        console.print(Text(f"rank {shown.place.rank}, micro-batch {shown.place.micro_batch}", style="bold"))
        for sample in shown.samples:
            console.print(Text(f"  {sample.key}  {sample.about}"))
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
