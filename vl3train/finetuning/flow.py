"""The order of a fine-tuning: check everything, make the data, plan, train, answer, report."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vl3train.config.input.user_input import UserInput
from vl3train.config.load import read_config
from vl3train.config.paths import ONE_LAUNCH, is_finished
from vl3train.config.problems import Problem
from vl3train.config.rules import problems
from vl3train.config.schema import TrainConfig
from vl3train.contracts.exit_codes import FINISHED, STOPPED
from vl3train.finetuning.data.shards import Split
from vl3train.finetuning.making import (
    CannotFinetuneError,
    Tell,
    changed_data,
    count_steps,
    index_data,
    make,
    split_or_note,
    split_problems,
    tokenizer_folder,
)
from vl3train.finetuning.plan import (
    Machine,
    plan_lines,
    save_options,
    step_options,
    this_machine,
)
from vl3train.finetuning.run_file import RUN_FILE, run_text, with_overrides, write_run_file
from vl3train.finetuning.start_model import StartModel, find_model
from vl3train.finetuning.wish import Wish, output_folder, run_options, said, shown_options, wish_problems
from vl3train.model.weights.headers.start import weights_problems

MADE_LATER = {"data.root", "data.recipe"}
"""Options that name what this command is about to write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A fine-tuning whose data are made and whose run.yaml is written."""

    cfg: TrainConfig
    out: Path
    run_file: Path
    overrides: tuple[str, ...]  # of this launch, besides run_file
    split: Split
    machine: Machine
    plan: tuple[str, ...]


def prepare(wish: Wish, tell: Tell) -> Prepared:
    """Check everything, make the data, and write run.yaml.

    Args:
        wish: what the person asks for.
        tell: takes lines for the person.

    Raises:
        ValueError: something keeps it from starting; the message has all of it.
    """
    machine = this_machine()
    out = output_folder(wish)
    found: list[object] = list(wish_problems(wish))
    try:
        start = find_model(wish.model, tell)
    except ValueError as error:
        start = None
        found.append(error)
    options: dict[str, Any] = {}
    cfg = None
    if start is not None and not found:
        on_gpu = machine.name != "CPU"
        options = {**run_options(wish, start, on_gpu=on_gpu), "step.global_packs": machine.ranks}
        cfg, in_config = _read(options, wish.overrides, machine.ranks)
        found += _all_problems(cfg, in_config)
    else:
        found += _problems_of_words(wish.overrides, machine.ranks)
    chosen = cfg.finetune if cfg is not None else None
    split = split_or_note(
        chosen.records if chosen else wish.records,
        chosen.media_roots if chosen else wish.media_roots,
        chosen.held_out if chosen else wish.held_out or "5%",
        found,
    )
    if split is not None:
        found += split_problems(split, skip=chosen.skip_rejected if chosen else wish.skip_rejected)
        found += changed_data(split, out)
    if found or cfg is None or split is None or start is None:
        raise CannotFinetuneError(found)
    typed = {key.lstrip("~") for text in wish.overrides for key in _keys(text)}
    once = tuple(
        text for text in wish.overrides if {f"run.{name}" for name in ONE_LAUNCH}.intersection(_keys(text))
    )
    options = shown_options(
        with_overrides(options, [text for text in wish.overrides if text not in once]), cfg
    )
    make(cfg, split, out, tell)
    num_samples = index_data(cfg, split, tell)
    options |= step_options(cfg, num_samples, typed)
    cfg = _known_good(_read(options, once, machine.ranks))
    num_steps = count_steps(cfg)
    options |= save_options(cfg, num_steps, split.held_out is not None, typed)
    cfg = _known_good(_read(options, once, machine.ranks))
    has_begun = (out / "checkpoints" / "latest").is_file()
    write_run_file(out, run_text(options, said(wish), out), has_begun=has_begun)
    return _prepared(cfg, once, out / RUN_FILE, split, start, machine)


def prepare_file(run_file: Path, overrides: Sequence[str], tell: Tell) -> Prepared:
    """The same of a run.yaml that a person may have edited, which stays as it is.

    Raises:
        ValueError: something keeps it from starting; the message has all of it.
    """
    machine = this_machine()
    cfg, in_config = read_config(list(overrides), config_file=run_file, dp_size=machine.ranks)
    found: list[object] = _all_problems(cfg, in_config)
    if cfg is None:
        raise CannotFinetuneError(found)
    out = Path(cfg.data.root).expanduser().absolute()
    if not cfg.finetune.records:
        way_out = "name the files of records in it, or train with `vl3train train --config`"
        found.append(Problem("finetune.records", "[]", f"{run_file} names no records", way_out))
        raise CannotFinetuneError(found)
    split = split_or_note(cfg.finetune.records, cfg.finetune.media_roots, cfg.finetune.held_out, found)
    if split is not None:
        found += split_problems(split, skip=cfg.finetune.skip_rejected)
        found += changed_data(split, out)
    if found or split is None:
        raise CannotFinetuneError(found)
    assert cfg.stage.init_from is not None, "config rules refuse this"
    start = find_model(cfg.stage.init_from, tell)
    make(cfg, split, out, tell)
    index_data(cfg, split, tell)
    return _prepared(cfg, tuple(overrides), run_file, split, start, machine)


def run(prepared: Prepared, tell: Tell) -> int:
    """Train, unless that is done, then write answers and report; the exit code of `vl3train train`."""
    from vl3train.finetuning.launching import train
    from vl3train.finetuning.results import next_commands, write_results

    cfg, out = prepared.cfg, Path(prepared.cfg.run.output_dir)
    if is_finished(cfg):
        tell(f"{out}: this run is finished; its answers and report are written again")
    else:
        code = train([*prepared.overrides, "--config", str(prepared.run_file)], prepared.machine.ranks)
        if code == STOPPED:
            tell("stopped, and saved; the same command goes on from there")
        if code != FINISHED:
            return code
    write_results(cfg, out, tell, is_held_out=prepared.split.held_out is not None)
    for line in next_commands(cfg, out):
        tell(line)
    return FINISHED


def _read(
    options: dict[str, Any], overrides: Sequence[str], ranks: int
) -> tuple[TrainConfig | None, list[Problem]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / RUN_FILE
        file.write_text(yaml.safe_dump(options, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return read_config(list(overrides), config_file=file, dp_size=ranks)


def _problems_of_words(overrides: Sequence[str], ranks: int) -> list[object]:
    """What is wrong with typed options alone, where a missing model keeps the whole config from being built."""
    typed = {key.lstrip("~") for text in overrides for key in _keys(text)}
    cfg, in_config = _read({"stage": "finetuning"}, overrides, ranks)
    found = [*in_config, *(problems(cfg) if cfg is not None else [])]
    return [one for one in found if one.key in typed or one.key.split("=")[0] in typed]


def _known_good(read: tuple[TrainConfig | None, list[Problem]]) -> TrainConfig:
    cfg, found = read
    if cfg is None or found:
        raise CannotFinetuneError(found)
    return cfg


def _keys(text: str) -> list[str]:
    """The options that a word of the command line sets."""
    user = UserInput()
    user.add_override(text)
    return [key for key, _ in user.values]


def _all_problems(cfg: TrainConfig | None, in_config: list[Problem]) -> list[object]:
    """What is wrong with the config and its model, but for what this command is about to write."""
    if cfg is None:
        return list(in_config)
    found = [*in_config, *(one for one in problems(cfg) if one.key not in MADE_LATER)]
    return [*found, *weights_problems(cfg, {one.key for one in found})]


def _prepared(
    cfg: TrainConfig,
    overrides: tuple[str, ...],
    run_file: Path,
    split: Split,
    start: StartModel,
    machine: Machine,
) -> Prepared:
    from vl3train.data.pipeline import open_data
    from vl3train.preview.plan_figures import plan_figures

    with tokenizer_folder(cfg) as folder:
        data = open_data(cfg, tokenizer_dir=folder, held_out=False, build=False)
        figures = plan_figures(cfg, data)
    assert start.sizes is not None, "weights_problems refuses damaged headers"
    return Prepared(
        cfg=cfg,
        out=Path(cfg.run.output_dir),
        run_file=run_file,
        overrides=overrides,
        split=split,
        machine=machine,
        plan=tuple(plan_lines(cfg, figures, start.sizes, machine, split.num_held_out)),
    )
