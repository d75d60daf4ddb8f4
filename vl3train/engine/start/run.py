"""The start of a run: its steps in order, then what they found, said on the console."""

from __future__ import annotations

import random

import numpy as np
import torch

from vl3train.config.choices import Memory
from vl3train.config.problems import counted
from vl3train.config.schema import TrainConfig
from vl3train.contracts.progress.record import progress
from vl3train.data.recipe import find_recipe, load_recipe
from vl3train.engine.checkpoints.cost import can_copy
from vl3train.engine.checkpoints.saver import Saver
from vl3train.engine.memory.fit_run import fit_run, to_fit
from vl3train.engine.memory.known import NO_LEVELS
from vl3train.engine.memory.warmup import warm_up_run
from vl3train.engine.mirror.remote import Mirror, MirrorError
from vl3train.engine.mirror.uploads import Uploads, other_run_there
from vl3train.engine.monitor.console import Console
from vl3train.engine.monitor.meter import make_meter
from vl3train.engine.optim.build import optimizer_cost
from vl3train.engine.ranks import Rank
from vl3train.engine.run import Run
from vl3train.engine.start.contents import CONTENTS, fingerprints
from vl3train.engine.start.data import RunData, data_remarks, open_run_data, sharing_remarks, unused_remarks
from vl3train.engine.start.engine import start_engine
from vl3train.engine.start.folder import OutputFolder, open_folder
from vl3train.engine.start.lock import FolderLock
from vl3train.engine.start.model import RunModel, start_model
from vl3train.engine.start.resume import ResumePoint, resume
from vl3train.engine.tracking.tracker import NoTracker, start_tracker
from vl3train.model.kernels.prove import Proving


def start_run(cfg: TrainConfig, rank: Rank, console: Console, lock: FolderLock, proving: Proving) -> Run:
    """Build a run, or build it again from the newest whole checkpoint in its output folder. All ranks call it.

    The caller closes ``console``, also where this raises: its bar has begun.

    Raises RunError on every rank for everything that keeps this config from being run here.
    """
    seed_everything(cfg.run.seed)
    progress.phase("start: output folder")
    folder = open_folder(cfg, rank)
    uploads = start_uploads(cfg, folder, rank, console)
    progress.phase("start: data")
    data = open_run_data(cfg, folder, rank, console)
    progress.phase("start: model")
    model = start_model(cfg, folder, rank, console, proving)
    # Before the engine: ZeRO-3 cuts the weights whose sizes the meter reads.
    meter = make_meter(model.hf_model, rank.device, recomputes_logits=not model.packed.makes_logits_once)
    progress.phase("start: engine")
    engine = start_engine(cfg, model, rank, console.message)
    progress.phase("start: resume")
    point = resume(cfg, folder, data, model, engine, rank)
    for remark in start_remarks(cfg, rank, folder, data, model, point):
        console.message(remark)
    progress.phase("start: memory and warm-up")
    to_do = cfg, engine, model.packed, data.train, point.cursor, data.num_steps
    fit = to_fit(*to_do) if cfg.machine.memory is Memory.auto else None
    if rank.device.type == "cuda" and cfg.machine.zero_stage < 3:
        warm_up_run(*to_do, console, NO_LEVELS if fit is None else fit.known.levels)
    if fit is not None:
        fit_run(fit, engine, model.packed, console.message)
    console.start(first_step=point.cursor.step, total_steps=data.num_steps)
    tracker = start_tracker(cfg, folder.path, step=point.cursor.step, is_first=rank.is_first)
    if not isinstance(tracker, NoTracker):
        recipe = find_recipe(cfg.data.recipe or cfg.stage.recipe)
        tracker.data([folder.path / CONTENTS, recipe], fingerprints(data))

    saver = Saver(
        folder.path / "checkpoints",
        engine=engine,
        write_weights=lambda partial, weights: model.write(partial, folder.processor_dir, weights),
        rank=rank,
        in_background=can_copy(
            engine,
            rank,
            folder.path / "checkpoints",
            is_wanted=cfg.run.save_in_background,
            say=console.message,
        ),
        step=point.cursor.step,
        say=console.message,
        when_whole=lambda name: None if uploads is None else uploads.offer(name),
    )
    return Run(
        cfg=cfg,
        rank=rank,
        folder=folder.path,
        lock=lock,
        data=data.train,
        held_out=data.held_out,
        recipe=load_recipe(cfg.data.recipe or cfg.stage.recipe, cfg.data.root),
        engine=engine,
        packed=model.packed,
        num_steps=data.num_steps,
        cursor=point.cursor,
        identity=point.identity,
        base_manifest=model.base_manifest,
        saver=saver,
        uploads=uploads,
        console=console,
        tracker=tracker,
        failed_samples=point.failed_samples,
        bad_steps=point.bad_steps,
        meter=meter,
        best=point.best,
        is_evaluated=point.is_evaluated,
        source_names=list(data.train.index.source_names),
    )


def start_uploads(cfg: TrainConfig, folder: OutputFolder, rank: Rank, console: Console) -> Uploads | None:
    """What copies checkpoints elsewhere, on the first rank of a run that wants it.

    Raises RunError on every rank where fsspec does not know the place, or where another run is.
    """
    uploads = problem = None
    if cfg.run.upload_to is not None and rank.is_first:
        try:
            mirror = Mirror(cfg.run.upload_to)
            problem = other_run_there(mirror, folder.path, folder.checkpoint is not None, console.message)
            uploads = Uploads(folder.path, mirror, console.message)
        except MirrorError as error:
            problem = str(error)
    rank.agree(None if problem is None else f"run.upload_to: {problem}")
    return uploads


def seed_everything(seed: int) -> None:
    """One seed for every generator; the data's order does not use them (data/plan/order.py has its own)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def start_remarks(
    cfg: TrainConfig, rank: Rank, folder: OutputFolder, data: RunData, model: RunModel, point: ResumePoint
) -> list[str]:
    """What a person should know before the first step, a line each."""
    remarks = [*folder.remarks, *data.changed, *point.remarks]
    for part, (trained, total) in model.counts.items():
        rate = f"rate {model.rates[part]:g}" if trained else "frozen"
        remarks.append(f"{part}: {trained:,} of {total:,} parameters trained, {rate}")
    num_trained = sum(trained for trained, _ in model.counts.values())
    resumed = (
        f", resumed after step {point.cursor.step} from {folder.checkpoint}" if folder.checkpoint else ""
    )
    return [
        *remarks,
        optimizer_cost(num_trained, cfg.optim, cfg.machine),
        *model.kernels.remarks(),
        *data_remarks(data.train),
        *(unused_remarks(data.held_out, "held-out samples", "evaluated") if data.held_out else ()),
        *(sharing_remarks(cfg, data.train.plan.table) if rank.is_first else ()),
        f"{counted(data.num_steps, 'step')} of {counted(cfg.step.global_packs, 'pack')} on "
        f"{counted(rank.dp_size, 'rank')}{resumed}",
    ]
