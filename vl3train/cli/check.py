"""Show what a run would train, or everything that is wrong with its config. Takes about a second, without a GPU;
where the samples are indexed some seconds more, to count the steps.

Of the folders to start from, the command reads config.json, the tokenizer and the headers of the weight files: missing,
damaged and unfitting ones are reported, and a chat template that training does not use.

examples:
  vl3train check stage=1 model=debug data=demo machine=cpu
  vl3train check stage=3 model=2b stage.init_from=runs/2b/2_alignment step.max_tokens=8192
  vl3train check --config my_run.yaml
"""

from __future__ import annotations

import textwrap
from argparse import ArgumentParser, Namespace

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vl3train.cli.ranks import add_nproc, ranks_of
from vl3train.config.checks.start import starts_from
from vl3train.config.choices import AdapterInit, AdapterKind, Base4Bit, Memory, Tracker
from vl3train.config.load import add_config_arguments
from vl3train.config.paths import is_finished
from vl3train.config.problems import ConfigError, Problem, counted, show
from vl3train.config.rules import adapter_rates, full_rates
from vl3train.config.schema import PARTS, TrackingConfig, TrainConfig
from vl3train.contracts.shapes import ENCODER, LANGUAGE_MODELS
from vl3train.data.recipe import Recipe
from vl3train.model.adapter_targets import adapter_sizes, alpha_of
from vl3train.model.weights.headers.template import start_template
from vl3train.preview.check_config import examine, indexed_steps

TRACKERS = {Tracker.wandb: "W&B", Tracker.tensorboard: "TensorBoard"}


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``vl3train check``."""
    add_config_arguments(parser)
    add_nproc(parser)
    ahead = "do not require that stage.init_from exists: check a stage before the earlier one is trained"
    parser.add_argument("--ahead", action="store_true", help=ahead)


def also_to(tracking: TrackingConfig) -> str:
    """Where figures and samples also go.

    >>> also_to(TrackingConfig(kind=Tracker.wandb))
    ', W&B (with 8 held-out samples of each source)'
    """
    if tracking.kind is Tracker.none:
        return ""
    samples = f" (with {counted(tracking.table_rows, 'held-out sample')} of each source)"
    return f", {TRACKERS[tracking.kind]}{samples if tracking.table_rows else ''}"


def main(args: Namespace) -> int:
    """Print the summary and return 0, or print all problems and return 1."""
    console = Console(highlight=False, soft_wrap=True)
    cfg, recipe, found = examine(args, dp_size=ranks_of(args))
    if cfg is not None:
        found = [*found, *mark_problems(cfg)]
    if args.ahead and cfg is not None and cfg.stage.init_from is not None:
        found = [problem for problem in found if problem.key != "stage.init_from"]
    if cfg is None or recipe is None or found:
        print_problems(console, found)
        return 1
    print_summary(console, cfg, recipe)
    if (found_template := start_template(cfg)) is not None:
        console.print(Text(found_template[1], style="yellow"))
    if is_finished(cfg):
        what = f"{cfg.run.output_dir}: this run is finished; name another run.output_dir to start a new one"
        console.print(Text(what, style="bold yellow"))
    return 0


def mark_problems(cfg: TrainConfig) -> list[Problem]:
    """What is wrong with the file that marks the run as finished."""
    try:
        is_finished(cfg)
    except ConfigError as error:
        return list(error.problems)
    return []


def print_problems(console: Console, found: list[Problem]) -> None:
    """All problems, numbered: key and value, what is wrong, what to do."""
    console.print(Text(f"{counted(len(found), 'problem')}: this run cannot start", style="bold red"))
    for number, problem in enumerate(found, start=1):
        named = problem.key if problem.value == "" else f"{problem.key}={show(problem.value)}"
        console.print(Text.assemble(f"{number}. ", (named, "bold")))
        console.print(Text(textwrap.indent(problem.what, "   ")))
        if problem.way_out:
            console.print(Text(f"   -> {problem.way_out}", style="green"))


def print_summary(console: Console, cfg: TrainConfig, recipe: Recipe) -> None:
    """What the run trains, on which data, with which batch, and what it starts from."""
    table = Table(
        title=f"stage {cfg.stage.number}: {cfg.stage.name}, model {cfg.model.name}", title_justify="left"
    )
    table.add_column("part")
    table.add_column("trained")
    table.add_column("learning rate", justify="right")
    table.add_column("parameters", justify="right")
    for row in part_rows(cfg):
        table.add_row(*row)
    console.print(table)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    for name, text in [*facts_of(cfg, indexed_steps(cfg, recipe)), ("data", describe_recipe(recipe, cfg))]:
        facts.add_row(name, Text(text))
    console.print(facts)


def part_rows(cfg: TrainConfig) -> list[tuple[str, str, str, str]]:
    """For each part: its name, how it is trained, its peak rate, its parameters."""
    full, adapted = full_rates(cfg), adapter_rates(cfg)
    rows = []
    for part in PARTS:
        size = cfg.model.num_parameters.get(part)
        number = "" if size is None else f"{size:,}"
        if part in adapted:
            rank = cfg.adapter.part_ranks.get(part, cfg.adapter.rank)
            held = " on 4 bits" if in_4_bits(cfg, part) else ""
            rows.append((part, f"LoRA, rank {rank}{held}", f"{adapted[part]:g}", f"{number} frozen"))
        elif part in full:
            rows.append((part, "in full", f"{full[part]:g}", number))
        else:
            rows.append((part, "frozen, in 4 bits" if in_4_bits(cfg, part) else "frozen", "", number))
    return rows


def sizes_of_adapters(cfg: TrainConfig) -> dict[str, int]:
    """Parameters of the adapters of each part; empty without adapters, or for a model of unknown shapes."""
    shape = LANGUAGE_MODELS.get(cfg.model.name)
    if cfg.adapter.kind is AdapterKind.none or shape is None:
        return {}
    return adapter_sizes(cfg.adapter, {"language_model": shape, "vision_encoder": ENCODER})


def in_4_bits(cfg: TrainConfig, part: str) -> bool:
    """Whether the linear layers of a part are held in 4 bits."""
    adapter = cfg.adapter
    on = adapter.kind is AdapterKind.lora and adapter.base_4bit is Base4Bit.nf4
    return on and part in adapter.base_4bit_parts


def facts_of(cfg: TrainConfig, steps: tuple[int, int] | None) -> list[tuple[str, str]]:
    """The other lines of the summary: name and text. ``steps`` of the run and of an epoch, where they are known."""
    step, data, machine, optim, run = cfg.step, cfg.data, cfg.machine, cfg.optim, cfg.run
    per_rank = step.global_packs // machine.dp_size
    samples = "as many samples as fit"
    if step.max_samples is not None:
        samples = f"at most {counted(step.max_samples, 'sample')}"
    pruning = (
        "visual tokens that repeat the frame before are pruned"
        if cfg.stage.prune_frames
        else "no frame pruning"
    )
    recompute = (
        f"recompute {show(machine.recompute_vision)} (encoder), {show(machine.recompute_language)} (LLM)"
    )
    if machine.memory is Memory.auto:
        recompute = (
            "recompute as little as fits the GPU's memory, measured at the start (machine.memory=auto)"
        )
    length = (
        counted(run.num_epochs, "virtual epoch") if run.num_steps is None else counted(run.num_steps, "step")
    )
    if steps is not None:
        whole = f", {counted(run.num_epochs, 'virtual epoch')}" if run.num_steps is None else ""
        length = f"{counted(steps[0], 'step')}{whole} ({counted(steps[1], 'step')} an epoch)"
    facts = [
        ("starts from", starts_from(cfg)),
        (
            "global batch",
            f"{counted(step.global_packs, 'pack')} ({counted(machine.dp_size, 'rank')} x {per_rank}) of "
            f"{step.max_tokens:,} tokens "
            f"and {step.max_patches:,} patches: {step.global_packs * step.max_tokens:,} tokens, {samples}",
        ),
        (
            "pictures",
            f"merge size {cfg.stage.image_merge_size} for images, {cfg.stage.video_merge_size} for clips; "
            f"{pruning}; {counted(data.fps, 'frame')} a second, at most {data.max_frames}; "
            f"at most {data.max_visual_tokens:,} visual tokens a sample",
        ),
        (
            "schedule",
            f"{length}, {show(optim.schedule)}, {optim.warmup_fraction:.0%} warm-up, "
            f"weight decay {optim.weight_decay:g}, gradients clipped to {optim.max_grad_norm:g}",
        ),
        (
            "machine",
            f"device {show(machine.device)}, {show(machine.dtype)}, ZeRO-{machine.zero_stage}, "
            f"attention {show(machine.attention)}, {recompute}, "
            f"layers {'compiled' if machine.compile_layers else 'not compiled'}",
        ),
        ("figures", f"console and metrics.jsonl{also_to(cfg.tracking)}"),
        ("output", run.output_dir),
    ]
    if cfg.adapter.kind is AdapterKind.lora:
        adapter = cfg.adapter
        sizes = sizes_of_adapters(cfg)
        kinds = ["rsLoRA"] * adapter.use_rslora + ["DoRA"] * adapter.use_dora or ["LoRA"]
        each = [
            f"{part} (rank {adapter.part_ranks.get(part, adapter.rank)}, alpha {alpha_of(adapter, part):g}"
            f"{', ' + counted(sizes[part], 'parameter') if part in sizes else ''})"
            for part in adapter.parts
        ]
        where = "all linear layers" if adapter.target_modules is None else ", ".join(adapter.target_modules)
        first = "" if adapter.init is AdapterInit.default else f", first weights {show(adapter.init)}"
        beside = ", ".join([*full_rates(cfg), *(set(adapter.modules_to_save) - set(PARTS))]) or "nothing"
        text = f"{' and '.join(kinds)} on {', '.join(each)}: {where}, dropout {adapter.dropout:g}{first}"
        facts.insert(1, ("adapters", f"{text}; in full beside them: {beside}"))
    return facts


def describe_recipe(recipe: Recipe, cfg: TrainConfig) -> str:
    """The recipe's sources with their weights, one a line."""
    head = f"recipe {recipe.name}, {counted(len(recipe.sources), 'source')} under {cfg.data.root}"
    uses = [
        f"{source.name}, weight {source.weight:g}" if source.shards else f"{source.name}, evaluation only"
        for source in recipe.sources
    ]
    return "\n  ".join([head, *uses])
