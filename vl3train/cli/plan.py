"""Show the plan of a run before it starts: steps, packs, sources, and estimates of time and memory.

The command reads the index only and decodes nothing. It shows how full and how balanced the packs are, the share of
each source and modality, which samples are rejected and why, and estimates of time, memory and decoding for a GPU.
The recipe must have an index: run `vl3train index` first.

examples:
  vl3train plan stage=3 model=2b stage.init_from=runs/2b/2_alignment machine=one_node
  vl3train plan stage=1 model=debug data=demo machine=cpu --gpu 4090 --picture plan.png
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vl3train.cli.arguments import share
from vl3train.cli.ranks import add_nproc, ranks_of
from vl3train.config.load import add_config_arguments
from vl3train.config.problems import counted
from vl3train.config.schema import TrainConfig
from vl3train.contracts.gpus import GPUS
from vl3train.preview.check_config import opened
from vl3train.preview.plan_estimate import (
    CLIP_FRAMES_PER_CORE_SECOND,
    IMAGE_PATCHES_PER_CORE_SECOND,
    STORED_FRAMES_PER_CORE_SECOND,
    UTILISATION,
    estimate,
)
from vl3train.preview.plan_figures import Group, PlanFigures, advice, plan_figures
from vl3train.preview.plan_picture import bars, draw_plan


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``vl3train plan``."""
    add_config_arguments(parser)
    add_nproc(parser)
    parser.add_argument(
        "--gpu", choices=sorted(GPUS), default="h100", help="GPU of the estimates (default h100)"
    )
    parser.add_argument(
        "--utilisation",
        type=share,
        default=UTILISATION,
        metavar="SHARE",
        help=f"share of the TFLOP/s in the GPU's data sheet (default {UTILISATION}, measured on an H100)",
    )
    parser.add_argument(
        "--picture",
        type=Path,
        default=Path("plan.png"),
        metavar="PNG",
        help="file of the picture (default plan.png)",
    )


def main(args: Namespace) -> int:
    """Print the figures and draw the picture; returns 0."""
    console = Console(highlight=False, soft_wrap=True)
    if not args.picture.absolute().parent.is_dir():
        raise FileNotFoundError(f"--picture {args.picture}: there is no folder {args.picture.parent}")
    with opened(args, dp_size=ranks_of(args)) as (cfg, data):
        figures = plan_figures(cfg, data)
        print_plan(console, cfg, figures, data.plan.fingerprint)
    print_estimate(console, cfg, figures, args.gpu, args.utilisation)
    title = f"{cfg.stage.name}: {figures.epoch.samples:,} samples in {figures.steps_in_epoch:,} steps"
    limits = {"max_tokens": cfg.step.max_tokens, "max_patches": cfg.step.max_patches}
    args.picture.write_bytes(draw_plan(figures, title=title, **limits))
    console.print(f"\npicture: {args.picture}")
    return 0


def print_plan(console: Console, cfg: TrainConfig, figures: PlanFigures, fingerprint: str) -> None:
    """All figures that are counted."""
    epoch, steps, shared = figures.epoch, figures.steps_in_epoch, figures.shared
    console.print(Text(f"plan {fingerprint}, stage {cfg.stage.number}: {cfg.stage.name}", style="bold"))
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    rows = [
        ("steps", f"{figures.num_steps:,} in the run, {steps:,} in a virtual epoch"),
        (
            "a step",
            f"{epoch.samples / steps:,.1f} samples, {(epoch.tokens - shared.tokens) / steps:,.0f} tokens, "
            f"{(epoch.patches - shared.patches) / steps:,.0f} patches in {counted(cfg.step.global_packs, 'pack')}",
        ),
        ("supervised", f"{epoch.supervised_tokens / epoch.tokens:.1%} of the tokens"),
        (
            "fill",
            f"{figures.token_fill.mean():.1%} of the packs' tokens, {figures.patch_fill.mean():.1%} of their patches",
        ),
        ("balance", f"costliest pack / mean pack: {_spread(figures.balance)}"),
        (
            "",
            f"costliest of {counted(cfg.machine.dp_size, 'rank')} / mean rank: {_spread(figures.rank_balance)}",
        ),
    ]
    if shared.families:
        saved = f"{shared.tokens / epoch.tokens:.1%} of the tokens, {shared.patches / epoch.patches:.1%} of the patches"
        text = f"{shared.families:,} with {shared.samples:,} samples; sharing their prefixes saves {saved}"
        rows.append(("families", text))
    for name, text in rows:
        facts.add_row(name, text)
    console.print(facts)
    if hint := advice(cfg, figures):
        console.print(Text(hint, style="yellow"))
    for what, groups in (("source", figures.sources), ("modality", figures.modalities)):
        console.print(_shares(what, groups, figures.epoch))
    for name, lengths in figures.lengths.items():
        table = Table.grid(padding=(0, 1))
        table.add_column(justify="right")
        table.add_column(justify="right")
        for row, number, bar in bars(lengths, width=40):
            table.add_row(row, f"{number:,}", bar)
        console.print(Text(f"\ntokens of a sample, {name}:", style="bold"))
        console.print(table)
    if figures.rejected:
        console.print(Text("\nrejected:", style="bold"))
        for reason, number, key in figures.rejected:
            console.print(Text(f"  {number:,}: {reason} (as {key})"))
    else:
        console.print("\nno sample is rejected")


def print_estimate(
    console: Console, cfg: TrainConfig, figures: PlanFigures, gpu: str, utilisation: float
) -> None:
    """The estimates, with the constants they come from."""
    found = estimate(cfg, figures, GPUS[gpu], utilisation)
    ranks = cfg.machine.dp_size
    console.print(Text(f"\nestimates for {ranks} x {gpu.upper()}, not measured there:", style="bold"))
    console.print(
        f"  time    {duration(found.step_seconds)} a step, {duration(found.run_hours * 3600)} for the run, "
        f"{duration(found.run_hours * 3600 * ranks)} of all GPUs together\n"
        f"          from model.costs as kFLOP, {GPUS[gpu].teraflops:g} TFLOP/s and utilisation {utilisation:g}"
    )
    if found.peak_gib is None:
        console.print(f"  memory  unknown: vl3train has no shapes of model {cfg.model.name}")
    else:
        has = GPUS[gpu].gigabytes * 1e9 / 2**30
        verdict = (
            "fits" if found.peak_gib < 0.9 * has else "tight" if found.peak_gib < has else "does not fit"
        )
        parts = ", ".join(f"{name} {size:.1f}" for name, size in found.memory.items())
        console.print(f"  memory  {found.peak_gib:.1f} GiB of {has:.1f} at the peak: {verdict} ({parts})")
        if found.recompute:
            console.print(f"          with machine.memory=auto, a full pack: {found.recompute}")
    console.print(
        f"  decode  {found.cores:.1f} cores keep up where clips have stored frames, {found.cores_unstored:.1f} where "
        f"they are decoded from 720p video\n"
        f"          from {IMAGE_PATCHES_PER_CORE_SECOND:,} image patches, {STORED_FRAMES_PER_CORE_SECOND} stored "
        f"frames or {CLIP_FRAMES_PER_CORE_SECOND} sampled frames of video a second a core"
    )


def duration(seconds: float) -> str:
    """A time in the unit that suits it.

    >>> duration(1e-5), duration(0.5), duration(90), duration(36e6)
    ('less than 0.01 seconds', '0.5 seconds', '1.5 minutes', '10,000 hours')
    """
    if seconds < 0.01:
        return "less than 0.01 seconds"
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            value = seconds / size
            return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"
    return f"{seconds:.3g} seconds"


def _spread(values: np.ndarray) -> str:
    middle, high = np.quantile(values, 0.5), np.quantile(values, 0.99)
    return f"p50 {middle:.3f}, p99 {high:.3f} ({counted(len(values), 'step')} counted)"


def _shares(what: str, groups: tuple[Group, ...], epoch: Group) -> Table:
    table = Table(title_justify="left")
    table.add_column(what)
    for name in ("samples", "share", "tokens", "share", "patches", "share", "supervised"):
        table.add_column(name, justify="right")
    for group in groups:
        cells = [group.name]
        for mine, all_ in (
            (group.samples, epoch.samples),
            (group.tokens, epoch.tokens),
            (group.patches, epoch.patches),
        ):
            cells += [f"{mine:,}", f"{mine / max(1, all_):.1%}"]
        table.add_row(*cells, f"{group.supervised_tokens / max(1, group.tokens):.1%}")
    return table
