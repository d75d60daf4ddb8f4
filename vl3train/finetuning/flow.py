"""The order of a fine-tuning: check everything, make the data, plan, train, answer, report."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vl3train.config.input.user_input import UserInput
from vl3train.config.load import read_config
from vl3train.config.paths import ONE_LAUNCH, is_finished, tokenizer_source
from vl3train.config.problems import Problem
from vl3train.config.rules import problems
from vl3train.config.schema import TrainConfig
from vl3train.contracts.exit_codes import FINISHED, STOPPED
from vl3train.contracts.files import write_whole
from vl3train.data.prepare.rejections import Rejection, describe_rejected
from vl3train.finetuning.data.shards import (
    RECIPE_MARK,
    Split,
    is_somebodys,
    made_from,
    make_data,
    recipe_text,
    split_records,
)
from vl3train.finetuning.plan import (
    Machine,
    plan_lines,
    save_options,
    step_options,
    steps_of,
    this_machine,
    trained_parameters,
)
from vl3train.finetuning.run_file import RUN_FILE, run_text, with_overrides, write_run_file
from vl3train.finetuning.start_model import StartModel, find_model
from vl3train.finetuning.wish import Wish, output_folder, run_options, said, shown_options, wish_problems
from vl3train.model.weights.headers.start import weights_problems

Tell = Callable[[str], None]
MADE_LATER = {"data.root", "data.recipe"}
"""Options that name what this command is about to write."""


class CannotFinetuneError(ValueError):
    """Everything that keeps a fine-tuning from starting; nothing was written."""

    def __init__(self, found: Sequence[object]) -> None:
        lines = [f"{number}. {one}" for number, one in enumerate(found, start=1)]
        super().__init__("\n".join([f"{len(found)} problem{'s' * (len(found) > 1)}:", *lines]))


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
    chosen = cfg.finetune if cfg is not None else None
    split = _split(
        chosen.records if chosen else wish.records,
        chosen.media_roots if chosen else wish.media_roots,
        chosen.held_out if chosen else wish.held_out or "5%",
        found,
    )
    if split is not None:
        found += _split_problems(split, skip=chosen.skip_rejected if chosen else wish.skip_rejected)
        found += _changed_data(split, out)
    if found or cfg is None or split is None or start is None:
        raise CannotFinetuneError(found)
    typed = {key.lstrip("~") for text in wish.overrides for key in _keys(text)}
    once = tuple(
        text for text in wish.overrides if {f"run.{name}" for name in ONE_LAUNCH}.intersection(_keys(text))
    )
    options = shown_options(
        with_overrides(options, [text for text in wish.overrides if text not in once]), cfg
    )
    _make(cfg, split, out, tell)
    num_samples = _index(cfg, split, tell)
    options |= step_options(cfg, num_samples, typed)
    cfg = _known_good(_read(options, once, machine.ranks))
    num_steps = _count_steps(cfg)
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
    split = _split(cfg.finetune.records, cfg.finetune.media_roots, cfg.finetune.held_out, found)
    if split is not None:
        found += _split_problems(split, skip=cfg.finetune.skip_rejected)
        found += _changed_data(split, out)
    if found or split is None:
        raise CannotFinetuneError(found)
    assert cfg.stage.init_from is not None, "config rules refuse this"
    start = find_model(cfg.stage.init_from, tell)
    _make(cfg, split, out, tell)
    _index(cfg, split, tell)
    return _prepared(cfg, tuple(overrides), run_file, split, start, machine)


def run(prepared: Prepared, tell: Tell) -> int:
    """Train, unless that is done, then write answers and report; the exit code of `vl3train train`."""
    from vl3train.finetuning.launching import train
    from vl3train.finetuning.results import next_commands, write_results

    cfg, out = prepared.cfg, Path(prepared.cfg.run.output_dir)
    if is_finished(cfg):
        tell(f"{out}: this run is finished; its answers and report are written again")
    else:
        code = train(prepared.run_file, prepared.overrides, prepared.machine.ranks)
        if code == STOPPED:
            tell("stopped, and saved; the same command goes on from there")
        if code != FINISHED:
            return code
    write_results(cfg, out, prepared.split.held_out, tell)
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


def _split(
    files: Sequence[str], media_roots: Sequence[str], held_out: str, found: list[object]
) -> Split | None:
    try:
        return split_records(files, media_roots, held_out)
    except ValueError as error:
        found.append(error)
        return None


def _split_problems(split: Split, *, skip: bool) -> list[object]:
    """Rejected records, unless the others shall be trained on, and a split without samples."""
    found: list[object] = list(split.problems)
    if split.rejected and not skip:
        found.append(_rejected_text(split.rejected, "records"))
    return found


def _rejected_text(rejected: Sequence[Rejection], what: str) -> str:
    lines = [f"{len(rejected)} {what} cannot be used (--skip-rejected trains on the others):"]
    return "\n".join([*lines, *describe_rejected(rejected)])


def _changed_data(split: Split, out: Path) -> list[object]:
    """Records that are other ones than those that a training has begun with."""
    recipe = out / "recipe.yaml"
    if recipe.is_file() and RECIPE_MARK not in recipe.read_text(encoding="utf-8", errors="replace"):
        return [f"{recipe} is a recipe that this command did not write; give another --out"]
    if is_somebodys(out / "data"):
        return [f"{out / 'data'} has files that were not made from records; give another --out"]
    before = made_from(out / "data")
    if before in (None, split.digest) or not (out / "checkpoints" / "latest").is_file():
        return []
    return [
        f"{out} has a training of other records: files, media or --held-out changed since it began. Put back what "
        "changed to go on with it, or give another --out"
    ]


def _make(cfg: TrainConfig, split: Split, out: Path, tell: Tell) -> None:
    """Shards and recipe."""
    out.mkdir(parents=True, exist_ok=True)
    written = make_data(split, out / "data", lambda what, count: None)
    write_whole(out / "recipe.yaml", recipe_text(out.name, split, cfg.finetune.records))
    how = "made" if written else "there already, from the same records"
    tell(f"data: {split.num_training:,} samples to train on, {split.num_held_out:,} held out; {how}")
    if split.rejected:
        tell(_rejected_text(split.rejected, "records"))
    for line in split.remarks:
        tell(f"data: {line}")


def _index(cfg: TrainConfig, split: Split, tell: Tell) -> int:
    """Measure every sample; how many can be trained on. Raises CannotFinetuneError for samples that cannot be used."""
    from vl3train.data.pipeline import open_data

    rejected: list[Rejection] = []
    num_samples = 0
    with _tokenizer(cfg) as folder:
        for held_out in (False, True) if split.held_out is not None else (False,):
            data = open_data(cfg, tokenizer_dir=folder, held_out=held_out, build=True)
            rejected += [Rejection(*one) for one in data.index.rejected]
            too_large = [data.index.key(row) for row in data.plan.oversized_samples]
            why = (
                f"larger than a pack (step.max_tokens={cfg.step.max_tokens}, step.max_patches={cfg.step.max_patches}); "
                "raise them, or lower data.max_visual_tokens"
            )
            rejected += [Rejection(key, why) for key in too_large]
            if not held_out:
                num_samples = data.index.num_samples - len(too_large)
    if rejected and not cfg.finetune.skip_rejected:
        raise CannotFinetuneError([_rejected_text(rejected, "samples")])
    if rejected:
        tell(_rejected_text(rejected, "samples"))
    return num_samples


def _count_steps(cfg: TrainConfig) -> int:
    from vl3train.data.pipeline import open_data

    with _tokenizer(cfg) as folder:
        return steps_of(cfg, open_data(cfg, tokenizer_dir=folder, held_out=False, build=False))


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

    with _tokenizer(cfg) as folder:
        data = open_data(cfg, tokenizer_dir=folder, held_out=False, build=False)
        figures = plan_figures(cfg, data)
    counts = trained_parameters(cfg, start.shapes)
    return Prepared(
        cfg=cfg,
        out=Path(cfg.run.output_dir),
        run_file=run_file,
        overrides=overrides,
        split=split,
        machine=machine,
        plan=tuple(plan_lines(cfg, figures, counts, machine, split.num_held_out)),
    )


@contextmanager
def _tokenizer(cfg: TrainConfig) -> Iterator[Path]:
    """A folder with the tokenizer exactly as a run writes it: the index holds its checksum."""
    from vl3train.model.weights.processor import build_processor

    with tempfile.TemporaryDirectory() as folder:
        build_processor(tokenizer_source(cfg)).save_pretrained(folder)
        yield Path(folder)
