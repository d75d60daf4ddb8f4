"""Whether a run may start, and the learning rates that follow from a config. Changes no config, imports no torch."""

from __future__ import annotations

from pathlib import Path

from vl3train.config.checks.adapters import adapter_problems
from vl3train.config.checks.budgets import budget_problems, cost_problems
from vl3train.config.checks.copies import copy_problems
from vl3train.config.checks.machine import machine_problems
from vl3train.config.checks.ranges import range_problems
from vl3train.config.checks.start import start_problems
from vl3train.config.checks.tracking import tracking_problems
from vl3train.config.choices import AdapterKind, BestFigure
from vl3train.config.problems import Problem
from vl3train.config.schema import PARTS, TrainConfig


def problems(cfg: TrainConfig) -> list[Problem]:
    """Everything that keeps the run from starting. Empty when it may start.

    The recipe is not checked here: see vl3train.data.recipe.
    """
    found = range_problems(cfg)
    if {problem.key for problem in found} & {"stage.number", "machine.dp_size", "step.global_packs"}:
        return found  # the rules below divide by these and choose by the stage
    return [
        *found,
        *rate_problems(cfg),
        *cost_problems(cfg),
        *start_problems(cfg),
        *budget_problems(cfg),
        *machine_problems(cfg),
        *adapter_problems(cfg),
        *folder_problems(cfg),
        *copy_problems(cfg),
        *silence_problems(cfg),
        *best_problems(cfg),
        *tracking_problems(cfg),
    ]


def effective_learning_rates(cfg: TrainConfig) -> dict[str, float]:
    """Peak learning rate of each part that the stage trains. The model's own rate replaces the stage's.

    Parts are in the order of schema.PARTS. A part that is missing is frozen.
    """
    rates = cfg.stage.learning_rates
    return {part: cfg.model.learning_rates.get(part, rates[part]) for part in PARTS if part in rates}


def adapter_rates(cfg: TrainConfig) -> dict[str, float]:
    """Peak learning rate of the adapters of each part that has them. The full weights of these parts are frozen."""
    if cfg.adapter.kind is AdapterKind.none:
        return {}
    own, rates = cfg.adapter.learning_rate, effective_learning_rates(cfg)
    return {part: rates[part] if own is None else own for part in cfg.adapter.parts}


def full_rates(cfg: TrainConfig) -> dict[str, float]:
    """Peak learning rate of each part whose full weights are trained."""
    rates = effective_learning_rates(cfg)
    if cfg.adapter.kind is AdapterKind.none:
        return rates
    own = cfg.adapter.learning_rate
    rates |= {
        part: own
        for part in PARTS
        if part in cfg.adapter.modules_to_save and part not in rates and own is not None
    }
    return {part: rates[part] for part in PARTS if part in rates and part not in cfg.adapter.parts}


def rate_problems(cfg: TrainConfig) -> list[Problem]:
    """Learning rates that are out of range or of parts that do not exist."""
    found = []
    if not cfg.stage.learning_rates and cfg.adapter.kind is AdapterKind.none:
        way_out = f"name parts with a rate each: {', '.join(PARTS)}"
        found.append(Problem("stage.learning_rates", "{}", "nothing would be trained", way_out))
    for owner in ("stage", "model"):
        for part, rate in getattr(cfg, owner).learning_rates.items():
            key = f"{owner}.learning_rates.{part}"
            if part not in PARTS:
                found.append(
                    Problem(key, rate, "the model has no such part", f"parts are {', '.join(PARTS)}")
                )
            elif not 0 < rate < 1:
                frozen = f"to freeze a part, write stage.learning_rates.{part}=null"
                way_out = frozen if rate == 0 else "published rates are 2e-6 to 1e-3"
                found.append(Problem(key, rate, "a learning rate must be between 0 and 1", way_out))
    return found


def silence_problems(cfg: TrainConfig) -> list[Problem]:
    """A report about silence that would come after the job has ended."""
    run = cfg.run
    if run.silence_seconds < run.collective_timeout_seconds:
        return []
    key, way_out = (
        "run.collective_timeout_seconds",
        f"set it to more than run.silence_seconds={run.silence_seconds:g}",
    )
    return [
        Problem(
            key, run.collective_timeout_seconds, "ends the job before a report about silence is due", way_out
        )
    ]


def best_problems(cfg: TrainConfig) -> list[Problem]:
    """A best checkpoint without evaluations to tell it by, and an early end without one."""
    run, found = cfg.run, []
    if run.best_figure is not BestFigure.none and not (run.evaluate_steps or run.evaluate_at_end):
        way_out = "set run.evaluate_steps to some steps"
        found.append(Problem("run.best_figure", run.best_figure, "the run never evaluates", way_out))
    if run.patience is not None and run.best_figure is BestFigure.none:
        way_out = "set run.best_figure=loss, or accuracy"
        found.append(
            Problem("run.patience", run.patience, "no figure tells which checkpoint is better", way_out)
        )
    if run.patience is not None and not run.evaluate_steps:
        way_out = "set run.evaluate_steps to some steps"
        found.append(
            Problem("run.patience", run.patience, "the run does not evaluate while it trains", way_out)
        )
    return found


def folder_problems(cfg: TrainConfig) -> list[Problem]:
    """Folders that are missing, or that are files."""
    found = []
    if not Path(cfg.data.root).expanduser().is_dir():
        way_out = "set it to the folder your shards are in"
        if (cfg.data.recipe or "").startswith("demo_"):
            way_out = f"make it with `vl3train demo {cfg.data.root}`"
        found.append(Problem("data.root", cfg.data.root, "no such folder", way_out))
    output = Path(cfg.run.output_dir).expanduser()
    there = next((folder for folder in (output, *output.parents) if folder.exists()), None)
    if there is not None and not there.is_dir():
        what = "is a file" if there == output else f"cannot be made: {there} is a file"
        found.append(Problem("run.output_dir", output, what, "name a folder"))
    return found
