"""The plan of a run in numbers, counted from the index alone: nothing is decoded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow.compute as pc

from vl3train.config.schema import TrainConfig
from vl3train.data.plan.costs import rank_packs
from vl3train.data.plan.plan import Plan

if TYPE_CHECKING:
    from vl3train.data.pipeline import OpenData

STEPS_COUNTED = 200
MODALITIES = ("text", "image", "video", "mixed")


class Shared(NamedTuple):
    """Families that share a prefix in a pack, and what is not computed again because of it."""

    families: int
    samples: int  # in families
    tokens: int
    patches: int


@dataclass(frozen=True, slots=True)
class Group:
    """Samples of one source or one modality in one virtual epoch."""

    name: str
    samples: int
    tokens: int
    patches: int
    supervised_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFigures:
    """One virtual epoch, and the packs of some of its steps."""

    num_steps: int  # of the run
    steps_in_epoch: int
    epoch: Group  # all samples of the epoch together
    sources: tuple[Group, ...]
    modalities: tuple[Group, ...]
    lengths: dict[str, np.ndarray]  # tokens of each sample of the index, by modality
    patches: dict[str, np.ndarray]  # patches likewise, where there are any
    image_patches: int  # of the epoch, decoded once for a family
    clip_frames: int  # of the epoch, sampled ones, likewise
    shared: Shared  # of the epoch
    rejected: tuple[tuple[str, int, str], ...]  # reason, how many, an example's key
    token_fill: np.ndarray  # (steps,) share of the packs' tokens in use, of the steps counted
    patch_fill: np.ndarray  # (steps,)
    balance: np.ndarray  # (steps,) work of the costliest pack over the mean pack
    rank_balance: np.ndarray  # (steps,) the same of ranks
    language_work: float  # of a mean step, in units of model.costs
    encoder_work: float


def plan_figures(cfg: TrainConfig, data: OpenData) -> PlanFigures:
    """Count the first virtual epoch and pack up to ``STEPS_COUNTED`` steps spread over it."""
    plan, index, table = data.plan, data.index, data.plan.table
    steps = plan.steps_in_epoch(0)
    order = np.asarray(plan.epoch_rows(0))
    tokens, patches = np.asarray(table.num_tokens), np.asarray(table.num_patches)
    supervised = np.asarray(table.num_supervised_tokens)
    modality = _modalities(data)
    source = np.repeat(np.arange(len(table.sizes)), table.sizes)

    def group(name: str, rows: np.ndarray) -> Group:
        sums = (int(values[rows].sum()) for values in (tokens, patches, supervised))
        return Group(name, len(rows), *sums)

    in_clips = np.isin(modality, ("video", "mixed"))
    frames = _clip_frames(data, modality == "video")
    counted = np.unique(np.linspace(0, max(0, steps - 2), min(steps, STEPS_COUNTED)).astype(int)).tolist()
    found = [plan.step_packs(plan.cursor_at(step)) for step in counted]
    costs = np.array([[pack.cost for pack in packs] for packs in found], float)
    ranks = np.array([_rank_costs(packs, cfg.machine.dp_size) for packs in found], float)
    caps = len(found[0]) * cfg.step.max_tokens, len(found[0]) * cfg.step.max_patches
    entries = plan.epoch_entries(0)
    decoded = order if plan.units is None else plan.units.first_rows[entries]
    language, encoder = plan.language_costs(entries).sum(), plan.entry_costs(entries).sum()
    return PlanFigures(
        num_steps=cfg.run.num_steps or plan.total_steps(cfg.run.num_epochs),
        steps_in_epoch=steps,
        epoch=group("all", order),
        sources=tuple(group(name, order[source[order] == i]) for i, name in enumerate(index.source_names)),
        modalities=tuple(
            group(name, mine) for name in MODALITIES if len(mine := order[modality[order] == name])
        ),
        lengths={name: tokens[modality == name] for name in MODALITIES if np.any(modality == name)},
        patches={name: patches[modality == name] for name in MODALITIES[1:] if np.any(modality == name)},
        image_patches=int(patches[decoded][~in_clips[decoded]].sum()),
        clip_frames=int(frames[decoded].sum()),
        shared=_shared(plan),
        rejected=_rejected(data),
        token_fill=np.array([sum(pack.num_tokens for pack in packs) for packs in found]) / caps[0],
        patch_fill=np.array([sum(pack.num_patches for pack in packs) for packs in found]) / caps[1],
        balance=costs.max(axis=1) / costs.mean(axis=1),
        rank_balance=ranks.max(axis=1) / ranks.mean(axis=1),
        language_work=float(language) / steps,
        encoder_work=float(encoder - language) / steps,
    )


def advice(cfg: TrainConfig, figures: PlanFigures) -> str | None:
    """Which option to change when packs are not balanced; None when they are (99 % of steps within 2 %)."""
    worst = float(np.quantile(figures.balance, 0.99))
    if worst <= 1.02:
        return None
    if figures.patch_fill.mean() > figures.token_fill.mean():
        return (
            f"packs reach step.max_patches={cfg.step.max_patches} before step.max_tokens; raise it, where memory "
            "allows, to fill and balance the packs better"
        )
    if len(figures.balance) > 1 and cfg.step.max_samples is not None:
        return (
            f"step.max_samples={cfg.step.max_samples} leaves too few samples to balance {cfg.step.global_packs} packs; "
            "raise it, or lower step.global_packs"
        )
    return "single samples cost more than a mean pack, or packs are too full to balance: lower step.fill"


def _shared(plan: Plan) -> Shared:
    units, prefix = plan.units, plan.table.prefix_tokens
    if units is None or prefix is None:
        return Shared(0, 0, 0, 0)
    entries = plan.epoch_entries(0)
    counts, firsts = units.num_records[entries].astype(np.int64), units.first_rows[entries]
    more = counts - 1
    return Shared(
        families=int((more > 0).sum()),
        samples=int(counts[more > 0].sum()),
        tokens=int((more * prefix[firsts]).sum()),
        patches=int((more * plan.table.num_patches[firsts]).sum()),
    )


def _rank_costs(packs: list, dp_size: int) -> list[int]:
    return [sum(pack.cost for pack in rank_packs(packs, rank, dp_size)) for rank in range(dp_size)]


def _modalities(data: OpenData) -> np.ndarray:
    return np.asarray(data.index.rows["modality"].to_numpy(zero_copy_only=False)).astype("U5")


def _clip_frames(data: OpenData, all_clips: np.ndarray) -> np.ndarray:
    """Frames of each sample's clips. Among images, only items of more than one frame are clips."""
    lists = data.index.rows["grids"].combine_chunks()
    grids = lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, 3)
    owner = np.repeat(np.arange(len(lists)), pc.list_value_length(lists).to_numpy(zero_copy_only=False) // 3)
    frames = np.where((grids[:, 0] > 1) | all_clips[owner], grids[:, 0], 0)
    return np.bincount(owner, frames, len(lists)).astype(np.int64)


def _rejected(data: OpenData) -> tuple[tuple[str, int, str], ...]:
    """Kinds of reasons for which samples are rejected, the most frequent first."""
    from vl3train.data.prepare.rejections import kind_of_reason

    step = data.plan.step
    too_large = f"larger than a pack (step.max_tokens={step.max_tokens}, step.max_patches={step.max_patches})"
    pairs = [(kind_of_reason(reason), key) for key, reason in data.index.rejected]
    pairs += [(too_large, data.index.key(row)) for row in data.plan.oversized_samples]
    example = {kind: key for kind, key in reversed(pairs)}
    return tuple((kind, count, example[kind]) for kind, count in Counter(k for k, _ in pairs).most_common())
