"""The second step of a start: the training samples and the held-out ones."""

from __future__ import annotations

from dataclasses import dataclass

from vl3train.config.schema import TrainConfig
from vl3train.data.pipeline import OpenData, open_data
from vl3train.data.plan.families import what_sharing_saves
from vl3train.data.plan.sample_table import SampleTable
from vl3train.engine.monitor.console import Console
from vl3train.engine.ranks import Rank
from vl3train.engine.start.folder import OutputFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """What a run reads."""

    train: OpenData
    held_out: OpenData | None  # None where the run never evaluates, or the recipe has no held-out samples
    num_steps: int
    changed: list[str]  # what was different when the data were indexed last; on the first rank, which indexes


def open_run_data(cfg: TrainConfig, folder: OutputFolder, rank: Rank, console: Console) -> RunData:
    """Open training and held-out data. Rank 0 builds a missing index, then all ranks read it.

    Raises RunError on every rank where the recipe, a shard or an index cannot be used.
    """
    evaluates = cfg.run.evaluate_at_start or cfg.run.evaluate_at_end or cfg.run.evaluate_steps > 0
    splits = (False, True) if evaluates else (False,)

    def open_split(held_out: bool, build: bool) -> OpenData:
        return open_data(
            cfg, tokenizer_dir=folder.processor_dir, held_out=held_out, build=build, progress=console.progress
        )

    problem = None
    changed: list[str] = []
    if rank.is_first:
        try:
            for held_out in splits:
                changed += open_split(held_out, build=True).changed
        except (OSError, ValueError) as error:
            problem = str(error)
    rank.agree(problem)
    opened = [open_split(held_out, build=False) for held_out in splits]
    train = opened[0]
    return RunData(
        train=train,
        held_out=opened[1] if evaluates and opened[1].index.num_samples else None,
        num_steps=cfg.run.num_steps or train.plan.total_steps(cfg.run.num_epochs),
        changed=changed,
    )


WORTH_TELLING = 0.05
"""Share of the tokens that ``data.share_prefix`` must save to be named where a run does not set it."""


def sharing_remarks(cfg: TrainConfig, table: SampleTable) -> list[str]:
    """That records of the same media could be trained on together, where that saves much. Said once at the start."""
    if cfg.data.share_prefix:
        return []
    found = what_sharing_saves(table, cfg.step.max_tokens, cfg.data.max_family_records)
    if found.tokens < WORTH_TELLING:
        return []
    return [
        f"data: {found.samples:.0%} of the samples show the same picture or clip as another; data.share_prefix=true "
        f"would take {found.tokens:.0%} fewer tokens (docs/families.md says when it suits)"
    ]


def data_remarks(data: OpenData) -> list[str]:
    """How many samples there are, and which of them are not trained on, with the reason. Said once at the start."""
    return [
        f"data: {data.index.num_samples:,} samples of {len(data.index.source_names)} sources",
        *unused_remarks(data, "data", "trained on"),
    ]


def unused_remarks(data: OpenData, what: str, used: str) -> list[str]:
    """Which samples are left out, with the reason; no line where all are ``used``."""
    index, plan, remarks = data.index, data.plan, []
    if plan.oversized_samples:
        keys = [index.key(row) for row in plan.oversized_samples[:3]]
        remarks.append(
            f"{what}: {len(plan.oversized_samples):,} samples are not {used}, because they are larger than a pack "
            f"(step.max_tokens={plan.step.max_tokens}, step.max_patches={plan.step.max_patches}): {', '.join(keys)}"
        )
    if index.rejected:
        shown = "; ".join(f"{key}: {reason}" for key, reason in index.rejected[:3])
        remarks.append(f"{what}: the index rejected {len(index.rejected):,} samples: {shown}")
    return remarks
