"""The fifth step of a start: the step to resume at, and the configs that cannot resume there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl3train.config.paths import FINISHED, what_adapts
from vl3train.config.plain import as_plain
from vl3train.config.problems import counted
from vl3train.config.schema import TrainConfig
from vl3train.contracts.records import Cursor
from vl3train.data.pipeline import OpenData
from vl3train.engine.bad_steps.record import BadSteps
from vl3train.engine.best import Best, start_best
from vl3train.engine.checkpoints.keep import name_latest
from vl3train.engine.checkpoints.load import load_checkpoint, refuse_other_identity
from vl3train.engine.held_out.evaluations_file import (
    EVALUATIONS,
    lost_evaluations,
    read_evaluations,
    truncate_evaluations,
)
from vl3train.engine.monitor.metrics_file import METRICS, changed_metrics, truncate_metrics
from vl3train.engine.ranks import Rank, RunError
from vl3train.engine.run import FailedSampleLimit
from vl3train.engine.start.contents import held_out_changes, keep_contents, train_changes
from vl3train.engine.start.data import RunData
from vl3train.engine.start.folder import OutputFolder, write_config
from vl3train.engine.start.model import RunModel
from vl3train.engine.zero.engine import Zero


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """Where a run begins: at its first step, or after the steps of its newest checkpoint."""

    cursor: Cursor  # the next step
    identity: dict[str, Any]  # see ``run_identity``
    failed_samples: FailedSampleLimit
    bad_steps: BadSteps
    best: Best
    is_evaluated: (
        bool  # after the steps that are done; a run that was killed while it evaluated does it again
    )
    remarks: list[
        str
    ]  # what changed since the checkpoint: figures, held-out samples, ranks; on the first rank


def resume(
    cfg: TrainConfig, folder: OutputFolder, data: RunData, model: RunModel, engine: Zero, rank: Rank
) -> ResumePoint:
    """Load the checkpoint, if there is one, and cut metrics.jsonl and evaluations.jsonl back to it. All ranks call it.

    Raises RunError where the checkpoint was made with another plan, model or numbers, or where this config cannot
    resume it. The number of ranks and the ZeRO stage may change.
    """
    identity = run_identity(cfg, data.train, model.counts, rank)
    if model.base_digest is not None:
        identity["base_4bit"] = model.base_digest
    cursor = Cursor()
    evaluations = evaluations_so_far(folder.path, rank)
    failed_samples = FailedSampleLimit(
        max_fraction=cfg.data.max_failed_fraction,
        most_at_once=cfg.data.max_family_records if cfg.data.share_prefix else 1,
    )
    bad_steps = BadSteps(cfg.optim)
    remarks: list[str] = []
    if folder.checkpoint is not None:
        stored = refuse_other_identity(folder.checkpoint, identity, lambda: train_changes(folder.path, data))
        refuse_what_cannot_resume(cfg, stored, data.num_steps)
        saved = load_checkpoint(folder.checkpoint, engine=engine, rank=rank)
        cursor = Cursor(**stored["cursor"])
        failed_samples.load(stored)
        bad_steps.load(stored)
        stored_evaluations = stored.get("evaluations")
        remarks = refuse_lost_evaluations(folder.path, evaluations, stored_evaluations, cursor.step, rank)
        if rank.is_first:
            remarks += [
                *changed_metrics(folder.path, stored.get("metrics")),
                *held_out_changes(folder.path, data),
            ]
            if saved is not None:
                remarks.append(
                    f"the checkpoint was saved with {saved}: its optimizer state is divided anew for this run"
                )
    best = start_best(cfg.run, evaluations, cursor.step)
    if rank.is_first:
        keep_contents(folder.path, data)
        moved = truncate_metrics(folder.path / METRICS, cursor.step)
        truncate_evaluations(folder.path / EVALUATIONS, cursor.step)
        if folder.checkpoint is not None:
            name_latest(folder.checkpoint)  # a newer one may be damaged
            best.write(folder.path)  # of a run that was killed while it went back
        elif moved:
            remarks.append(
                f"there is no checkpoint: the run starts over from its first step. {counted(moved, 'line')} of figures "
                f"of its steps before are now in {folder.path / 'metrics.replaced.jsonl'}"
            )
        write_config(cfg, folder.path)
        if cursor.step < data.num_steps:  # it was finished, and shall now do more steps
            (folder.path / FINISHED).unlink(missing_ok=True)
    return ResumePoint(
        cursor=cursor,
        identity=identity,
        failed_samples=failed_samples,
        bad_steps=bad_steps,
        best=best,
        is_evaluated=any(line["step"] == cursor.step and line["when"] != "start" for line in evaluations),
        remarks=remarks,
    )


def evaluations_so_far(folder: Path, rank: Rank) -> list[dict[str, Any]]:
    """The lines of evaluations.jsonl, on every rank. Raises RunError on every rank where they are damaged."""
    problem, found = None, []
    if rank.is_first:
        try:
            found = read_evaluations(folder / EVALUATIONS)
        except ValueError as error:
            problem = str(error)
    rank.agree(problem)
    return rank.gather(found)[0]


def refuse_lost_evaluations(
    folder: Path, evaluations: list[dict[str, Any]], stored: dict[str, Any] | None, done: int, rank: Rank
) -> list[str]:
    """What ``lost_evaluations`` says, on the first rank; RunError on every rank where it raises."""
    problem, remarks = None, []
    if rank.is_first:
        try:
            remarks = lost_evaluations(folder / EVALUATIONS, evaluations, stored, done)
        except ValueError as error:
            problem = str(error)
    rank.agree(problem)
    return remarks


def refuse_what_cannot_resume(cfg: TrainConfig, stored: dict[str, Any], num_steps: int) -> None:
    """Raise RunError, with every reason at once, where this config cannot resume a checkpoint of the same run.

    ``stored`` is the checkpoint's resume.json.
    """
    found = []
    before, now = stored["config"]["optim"]["weight_decay"], cfg.optim.weight_decay
    if (before > 0) != (now > 0):
        found.append(
            f"  optim.weight_decay={now:g}, and the checkpoint has {before:g}: with it biases and norms form groups of "
            f"their own, which AdamW's stored states do not have; set optim.weight_decay={before:g}"
        )
    done = stored["cursor"]["step"]
    if done > num_steps:
        found.append(
            f"  the run has {num_steps} steps, and the checkpoint has done {done}; set run.num_steps={done} or more"
        )
    if found:
        found.append("or start a new run with another run.output_dir")
        raise RunError("\n".join([f"the run in {cfg.run.output_dir} cannot be resumed:", *found]))


def run_identity(
    cfg: TrainConfig, data: OpenData, counts: dict[str, tuple[int, int]], rank: Rank
) -> dict[str, Any]:
    """What a checkpoint must share with the run that resumes it."""
    return {
        "stage": cfg.stage.number,
        "plan": data.plan.describe(),
        "model": {part: {"trained": trained, "total": total} for part, (trained, total) in counts.items()},
        "adapter": what_adapts(as_plain(cfg.adapter)),
        "machine": {
            "machine.dp_size": rank.dp_size,
            "machine.zero_stage": cfg.machine.zero_stage,
            "machine.dtype": cfg.machine.dtype.value,
            "optim.state_dtype": cfg.optim.state_dtype.value,
            "optim.master_dtype": cfg.optim.master_dtype.value,
        },
    }
