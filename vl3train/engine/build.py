"""What a run is built from: its processor, its data, its model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.utils import logging as transformers_logging

from vl3train.config.choices import Dtype
from vl3train.config.paths import resolve_weights
from vl3train.config.plain import as_plain
from vl3train.config.schema import TrainConfig
from vl3train.data.pipeline import OpenData, open_data
from vl3train.engine.monitor.console import Console
from vl3train.engine.ranks import Rank
from vl3train.model.weights.from_parts import check_vocabulary, init_from_parts, load_model
from vl3train.model.weights.hf_folder import save_weights
from vl3train.model.weights.processor import build_processor

transformers_logging.disable_progress_bar()  # one bar a rank, for a second


def clear_start(folder: Path, rank: Rank) -> None:
    """Remove processor and base that a run left which came to no checkpoint: its options may have been others.

    Raises RunError on every rank where nothing shows that a run left them: they may be somebody's only copy.
    """
    problem = None
    if rank.is_first and (left := [one for one in (folder / "processor", folder / "base") if one.exists()]):
        if _was_a_run(folder):
            for one in left:
                shutil.rmtree(one)
        else:
            problem = (
                f"run.output_dir={folder} holds {' and '.join(one.name for one in left)}, which a run writes, and no "
                "config.yaml of a run: name a folder of its own, or move them away"
            )
    rank.agree(problem)


def _was_a_run(folder: Path) -> bool:
    file = folder / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text()) if file.is_file() else None
    except (yaml.YAMLError, UnicodeDecodeError):
        return False  # nothing that a run wrote
    return isinstance(config, dict) and {"stage", "run", "machine"} <= config.keys()


def write_config(cfg: TrainConfig, folder: Path) -> None:
    """The options of this run, and the mark of its folder."""
    (folder / "config.yaml").write_text(yaml.safe_dump(as_plain(cfg), sort_keys=False))


def write_processor(cfg: TrainConfig, folder: Path, rank: Rank) -> Path:
    """The run's processor (tokenizer, pixel budgets, chat template) in ``<output_dir>/processor``."""
    target = folder / "processor"
    problem = None
    if rank.is_first and not (target / "tokenizer.json").exists():
        tokenizer_from = cfg.model.tokenizer_from or cfg.model.language_model_from
        if cfg.stage.init_from is not None and cfg.model.tokenizer_from is None:
            tokenizer_from = str(resolve_weights(cfg.stage.init_from))
        assert tokenizer_from is not None, "config rules refuse a run without a tokenizer"
        try:
            processor = build_processor(
                tokenizer_from,
                data=cfg.data,
                image_merge_size=cfg.stage.image_merge_size,
                video_merge_size=cfg.stage.video_merge_size,
                prune_frames=cfg.stage.prune_frames,
            )
        except (OSError, ValueError) as error:
            problem = f"the tokenizer could not be read from {tokenizer_from}: {error}"
        else:
            problem = _save_processor(processor, target)
    rank.agree(problem)
    return target


def _save_processor(processor: Any, target: Path) -> str | None:
    """Write it; the first file of a run, so that an output folder which cannot be written is found out here."""
    try:
        processor.save_pretrained(target)
    except OSError as error:
        return f"run.output_dir={target.parent} cannot be written: {error}; name a folder that can be"
    return None


def open_both(
    cfg: TrainConfig, processor_dir: Path, rank: Rank, console: Console
) -> tuple[OpenData, OpenData | None]:
    """Training and held-out data. Rank 0 makes a missing index, then all read it."""
    wants_held_out = cfg.run.evaluate_at_start or cfg.run.evaluate_at_end or cfg.run.evaluate_steps > 0
    splits = (False, True) if wants_held_out else (False,)

    def open_split(held_out: bool, build: bool) -> OpenData:
        return open_data(
            cfg, tokenizer_dir=processor_dir, held_out=held_out, build=build, progress=console.progress
        )

    problem = None
    if rank.is_first:
        try:
            for held_out in splits:
                open_split(held_out, build=True)
        except (OSError, ValueError) as error:
            problem = str(error)
    rank.agree(problem)
    opened = [open_split(held_out, build=False) for held_out in splits]
    return opened[0], opened[1] if wants_held_out and opened[1].index.num_samples else None


def build_model(cfg: TrainConfig, checkpoint: Path | None, processor_dir: Path) -> Any:
    """The transformers model: from the checkpoint to resume, the stage before, or the published parts."""
    dtype = torch.bfloat16 if cfg.machine.dtype is Dtype.bfloat16 else torch.float32
    if checkpoint is not None:
        stored = checkpoint / "weights"
        return load_model(stored if stored.exists() else Path(cfg.run.output_dir) / "base", dtype=dtype)
    if cfg.stage.init_from is not None:
        return load_model(resolve_weights(cfg.stage.init_from), dtype=dtype)
    assert cfg.model.vision_encoder_from is not None, "config rules refuse this"
    assert cfg.model.language_model_from is not None, "config rules refuse this"
    processor = load_processor(processor_dir)
    model = init_from_parts(
        cfg.model.vision_encoder_from,
        cfg.model.language_model_from,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        initializer_range=cfg.model.initializer_range,
        seed=cfg.run.seed,
        dtype=dtype,
    )
    check_vocabulary(model.config, len(processor.tokenizer) - 1)
    return model


def data_remarks(data: OpenData) -> list[str]:
    """What of the recipe's samples will not be trained on, and why: said once at the start."""
    index, plan = data.index, data.plan
    remarks = [f"data: {index.num_samples:,} samples of {len(index.source_names)} sources"]
    if plan.oversized_samples:
        keys = [index.key(row) for row in plan.oversized_samples[:3]]
        remarks.append(
            f"data: {len(plan.oversized_samples):,} samples are larger than a pack (step.max_tokens="
            f"{plan.step.max_tokens}, step.max_patches={plan.step.max_patches}) and are left out: {', '.join(keys)}"
        )
    if index.refused:
        shown = "; ".join(f"{key}: {reason}" for key, reason in index.refused[:3])
        remarks.append(f"data: {len(index.refused):,} samples cannot be used: {shown}")
    return remarks


def keep_base(hf_model: Any, processor_dir: Path, folder: Path, rank: Rank) -> None:
    """The model that adapters are trained on, once, in ``<output_dir>/base``: checkpoints hold adapters alone."""
    if rank.is_first and not (folder / "base").exists():
        save_weights(hf_model, load_processor(processor_dir), folder / "base")
    rank.barrier()


def load_processor(folder: Path) -> Any:
    """The processor that ``write_processor`` left."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)
