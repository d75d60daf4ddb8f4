"""The first step of a start: the output folder, the checkpoint to resume from, and the run's processor."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vl3train.config.paths import resolve_start, tokenizer_source
from vl3train.config.plain import as_plain
from vl3train.config.schema import TrainConfig
from vl3train.contracts.files import whole_folder, write_whole
from vl3train.data.render.chat_tokens import ChatTokenizer
from vl3train.engine.checkpoints.find import find_checkpoint, shown
from vl3train.engine.ranks import Rank
from vl3train.model.weights.headers.manifest import MANIFEST, damage, write_manifest
from vl3train.model.weights.headers.run_files import base_remark
from vl3train.model.weights.headers.template import KEPT, start_template
from vl3train.model.weights.processor import build_processor


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFolder:
    """The output folder of a run, ready to be written to."""

    path: Path
    checkpoint: Path | None  # the newest whole checkpoint, which the run resumes from
    remarks: list[str]  # what is wrong with newer checkpoints; what of the start folder is not used
    processor_dir: Path  # tokenizer, pixel budgets and chat template of this run


def open_folder(cfg: TrainConfig, rank: Rank) -> OutputFolder:
    """Find the newest whole checkpoint, or prepare the folder for a new run. All ranks call it.

    Raises RunError on every rank where the folder holds something else, where it cannot be written, or where the
    tokenizer cannot be read.
    """
    folder = Path(cfg.run.output_dir)
    checkpoint, remarks = find_checkpoint(folder / "checkpoints", rank)
    if checkpoint is None:
        clear_folder(folder, rank)
    processor_dir, faults = write_processor(cfg, folder, rank)
    remarks += faults
    if checkpoint is None and rank.is_first:
        write_config(cfg, folder)  # before the long steps: it marks the folder as that of a run
        remarks = [*remarks, *keep_template(cfg, folder), *merged_start(cfg)]
    elif checkpoint is not None and (checkpoint / "adapter").is_dir():
        remarks += filter(None, [base_remark(folder / "base", checkpoint)])
    return OutputFolder(path=folder, checkpoint=checkpoint, remarks=remarks, processor_dir=processor_dir)


def clear_folder(folder: Path, rank: Rank) -> None:
    """Remove processor and base of a run that ended before its first checkpoint: its options may have differed.

    Raises RunError on every rank where no config.yaml shows that a run wrote them: they may be somebody's only copy.
    """
    problem = None
    if rank.is_first and (left := [one for one in (folder / "processor", folder / "base") if one.exists()]):
        if _was_a_run(folder):
            for one in left:
                shutil.rmtree(one)
        else:
            problem = (
                f"run.output_dir={folder} holds {' and '.join(one.name for one in left)}, which a run writes, and no "
                "config.yaml of a run: name another folder, or move them away"
            )
    rank.agree(problem)


def _was_a_run(folder: Path) -> bool:
    file = folder / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (yaml.YAMLError, UnicodeDecodeError):
        return False  # no run wrote it
    return isinstance(config, dict) and {"stage", "run", "machine"} <= config.keys()


def write_config(cfg: TrainConfig, folder: Path) -> None:
    """Write the options of this run as config.yaml, which also marks the folder as that of a run."""
    write_whole(folder / "config.yaml", yaml.safe_dump(as_plain(cfg), sort_keys=False))


def write_processor(cfg: TrainConfig, folder: Path, rank: Rank) -> tuple[Path, list[str]]:
    """Write the run's processor to ``<output_dir>/processor``, if it is not there or not what was written; returns that
    folder, and what was wrong with it.

    Raises RunError on every rank where the tokenizer cannot be read or the folder cannot be written.
    """
    target = folder / "processor"
    problem, remarks = None, []
    if rank.is_first:
        faults = faults_of_processor(target)
        if faults:
            tokenizer_from = tokenizer_source(cfg)
            remarks = [f"{target} is written anew, with the tokenizer of {tokenizer_from}: {shown(faults)}"]
        if faults or not target.exists():
            problem = _make_processor(cfg, target)
    rank.agree(problem)
    return target, remarks


def faults_of_processor(target: Path) -> list[str]:
    """What is wrong with the processor of a run; nothing where there is none yet. Builds before 2026-12 wrote no
    digests: of theirs the tokenizer is read."""
    if not target.exists():
        return []
    if (target / MANIFEST).is_file():
        return damage(target)
    try:
        ChatTokenizer.from_folder(target)
    except ValueError as error:
        return [str(error)]
    return []


def _make_processor(cfg: TrainConfig, target: Path) -> str | None:
    """Write the processor, the first file of a run, in place of what is there; returns why not, or None."""
    tokenizer_from = tokenizer_source(cfg)
    try:
        processor = build_processor(
            tokenizer_from,
            data=cfg.data,
            image_merge_size=cfg.stage.image_merge_size,
            video_merge_size=cfg.stage.video_merge_size,
            prune_frames=cfg.stage.prune_frames,
        )
    except (OSError, ValueError) as error:
        return f"the tokenizer could not be read from {tokenizer_from}: {error}"
    try:
        if target.exists():
            shutil.rmtree(target)
        with whole_folder(target) as partial:
            processor.save_pretrained(partial)
            write_manifest(partial)
    except OSError as error:
        return f"run.output_dir={target.parent} cannot be written: {error}; name another folder"
    return None


def keep_template(cfg: TrainConfig, folder: Path) -> list[str]:
    """Keep a copy of the start folder's chat template where it renders otherwise than training; says so in a remark."""
    (folder / KEPT).unlink(missing_ok=True)  # of a start with other options
    found = start_template(cfg)
    if found is None:
        return []
    own, remark = found
    write_whole(folder / KEPT, own.text)
    return [remark]


def merged_start(cfg: TrainConfig) -> list[str]:
    """Says that the weights to start from are adapters and what they are on."""
    if cfg.stage.init_from is None or not Path(cfg.stage.init_from).expanduser().is_dir():
        return []
    weights, adapter = resolve_start(cfg.stage.init_from)
    if adapter is None:
        return []
    dtype = cfg.machine.dtype.value
    return [f"starts from the adapters in {adapter}, merged in float32 into {weights}, and cast to {dtype}"]


def gone(folder: Path, rank: Rank) -> str | None:
    """What is wrong with the output folder of a run in progress, the same on every rank; None where nothing is.

    It is asked before the run writes or reads more than lines: a folder that was moved away may come back.
    """
    problem = None
    if rank.is_first and not (folder / "processor").is_dir():
        problem = (
            f"run.output_dir={folder} is no longer the folder that this run began in: it was moved or deleted, with "
            "the checkpoints. Move it back"
        )
    return rank.gather(problem)[0]


def load_processor(folder: Path) -> Any:
    """The processor that ``write_processor`` wrote."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder, trust_remote_code=False)
