"""recipe -> index -> plan -> loader -> batches, in that order and nowhere else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from vl3train.config.schema import TrainConfig
from vl3train.contracts.line_log import LineLog
from vl3train.contracts.progress.record import WAITING_FOR_DATA, progress
from vl3train.contracts.records import Batch, Cursor, RenderSettings, TooManyFailed
from vl3train.contracts.strict_json import json_text
from vl3train.data.data_wait import data_wait
from vl3train.data.loader import FailedEntry, OpenData, PackDataset, load_packs
from vl3train.data.media.clips import DecodeLimits
from vl3train.data.plan.cache import default_folder, delete_unused
from vl3train.data.plan.order import OrderRules
from vl3train.data.plan.plan import Plan
from vl3train.data.prepare.build_index import build_indexes
from vl3train.data.prepare.store_frames import store_recipe
from vl3train.data.recipe import load_recipe, recipe_problems
from vl3train.data.render.chat_tokens import ChatTokenizer
from vl3train.data.shards.index import Index, open_index
from vl3train.data.shards.manifest import IndexPlace
from vl3train.data.shards.remote import RangeCache


@dataclass(frozen=True, kw_only=True)
class StepBatches:
    """What one rank runs in one step, and what the plan knows of the whole step."""

    cursor: Cursor
    batches: list[Batch]  # K / dp_size micro-batches
    num_supervised_tokens: int  # of the global batch, as planned
    num_tokens: int  # of the global batch
    num_patches: int  # of the global batch
    num_samples: int  # of the global batch
    fill: float  # share of the packs' tokens or patches in use, whichever is more
    is_blank: bool  # the wait for this rank's data was given up: the step must change nothing


def render_settings(cfg: TrainConfig, tokenizer: ChatTokenizer) -> RenderSettings:
    """What of a config decides the ids, patches and lengths of a sample."""
    data = cfg.data
    return RenderSettings(
        image_merge_size=cfg.stage.image_merge_size,
        video_merge_size=cfg.stage.video_merge_size,
        prune_frames=cfg.stage.prune_frames,
        fps=data.fps,
        frame_sampling=data.frame_sampling.value,
        min_frames=data.min_frames,
        max_frames=data.max_frames,
        image_min_pixels=data.image_min_pixels,
        image_max_pixels=data.image_max_pixels,
        video_min_pixels=data.video_min_pixels,
        video_max_pixels=data.video_max_pixels,
        max_visual_tokens=data.max_visual_tokens,
        tokenizer=tokenizer.fingerprint,
        stream_supervision=data.stream_supervision.value,
        grey16=data.grey16.value,
        transparent=data.transparent.value,
    )


def decode_limits(cfg: TrainConfig) -> DecodeLimits:
    """What a file's header may say."""
    return DecodeLimits(max_pixels=cfg.data.decode_max_pixels, max_seconds=cfg.data.decode_max_seconds)


def open_data(
    cfg: TrainConfig,
    *,
    tokenizer_dir: Path,
    held_out: bool,
    build: bool,
    decode: bool = False,
    progress: Callable[[str, int, int], None] = lambda source, done, total: None,
) -> OpenData:
    """Open the recipe's training samples, or its held-out ones.

    Of several ranks one calls this with ``build`` first; the others after it, without.

    Args:
        build: index what is not indexed yet; else that is an error.
        decode: decode every image and clip whole; an index made without is made anew.
        progress: called in the index pass with the source's name, samples done and samples in all.

    Raises:
        ValueError: the recipe, a shard or an index cannot be used, or there is no sample to train on.
    """
    recipe = load_recipe(cfg.data.recipe or cfg.stage.recipe, cfg.data.root)
    if problems := recipe_problems(recipe, cfg.data.root):
        raise ValueError("\n".join(problems))
    settings, limits = render_settings(cfg, ChatTokenizer.from_folder(tokenizer_dir)), decode_limits(cfg)
    index_dir = Path(cfg.data.index_dir).expanduser() if cfg.data.index_dir else None
    sources: list[tuple[str, float, IndexPlace | None]] = []
    for source in recipe.sources:
        folder = source.held_out if held_out else source.shards
        place = None
        if folder is not None:
            place = IndexPlace(shards=folder, settings=settings, limits=limits, index_dir=index_dir)
        sources.append((source.name, source.weight, place))
    places = [(name, place) for name, _, place in sources if place is not None]
    changed = []
    if build:
        changed = build_indexes(
            places,
            tokenizer_dir=tokenizer_dir,
            num_workers=cfg.data.num_workers,
            decode_seconds=cfg.data.decode_seconds,
            progress=progress,
            decode=decode,
        )
    index, plan = _open_plan(cfg, sources)
    if not held_out and len(plan.oversized_samples) == index.num_samples:
        raise ValueError(
            f"{recipe.path}: no sample to train on: the index rejected {len(index.rejected)}, "
            f"{len(plan.oversized_samples)} are larger than step.max_tokens={cfg.step.max_tokens} or "
            f"step.max_patches={cfg.step.max_patches}"
            + "".join(f"\n  {key}: {reason}" for key, reason in index.rejected[:5])
        )
    return OpenData(
        index=index,
        plan=plan,
        settings=settings,
        tokenizer_dir=tokenizer_dir,
        limits=limits,
        decode_seconds=cfg.data.decode_seconds,
        retry_seconds=cfg.data.retry_seconds,
        places=tuple(places),
        changed=tuple(changed),
    )


def _open_plan(cfg: TrainConfig, sources: list[tuple[str, float, IndexPlace | None]]) -> tuple[Index, Plan]:
    """The index of some sources, each a name, a weight and its shards, and the plan over it."""
    cache = None
    if cfg.data.remote_cache is not None:
        cache = RangeCache(Path(cfg.data.remote_cache).expanduser(), cfg.data.remote_cache_bytes)
    plans = Path(cfg.data.plan_cache).expanduser() if cfg.data.plan_cache else default_folder()
    delete_unused(plans)
    index = open_index(sources, cache, plans)
    plan = Plan(
        index.sample_table(),
        cfg.run.seed,
        cfg.step,
        costs=dict(cfg.model.costs),
        order=OrderRules(cfg.data.max_epoch_samples, cfg.data.block_shards),
        max_family_records=cfg.data.max_family_records if cfg.data.share_prefix else 1,
        cache=plans,
    )
    return index, plan


def store_frames(
    cfg: TrainConfig, out: Path, *, tokenizer_dir: Path, progress: Callable[[str, int, int], None]
) -> Path:
    """Write the recipe's samples below ``out`` with frames in place of clips; the recipe that names them.

    Raises:
        ValueError: the recipe cannot be used.
    """
    recipe = load_recipe(cfg.data.recipe or cfg.stage.recipe, cfg.data.root)
    if problems := recipe_problems(recipe, cfg.data.root):
        raise ValueError("\n".join(problems))
    return store_recipe(
        recipe,
        out,
        render_settings(cfg, ChatTokenizer.from_folder(tokenizer_dir)),
        tokenizer_dir=tokenizer_dir,
        limits=decode_limits(cfg),
        num_workers=cfg.data.num_workers,
        decode_seconds=cfg.data.decode_seconds,
        progress=progress,
    )


def train_steps(
    data: OpenData,
    cfg: TrainConfig,
    *,
    first: Cursor,
    last_step: int,
    rank: int,
    dp_size: int,
    ledger_path: Path,
) -> Generator[StepBatches, None, None]:
    """Steps ``first.step`` to ``last_step`` (not included), as one rank runs them.

    Samples that fail are written to ``ledger_path`` (one for each rank) when their step is handed out.

    Raises:
        TooManyFailed: ``data.max_consecutive_failed`` of this rank's samples failed one after the other; a family,
            which fails as one, counts once.
    """
    plan, num_micro_batches = data.plan, data.plan.step.global_packs // dp_size
    dataset = _dataset(data, cfg, first, rank, dp_size)
    loaded = load_packs(
        dataset,
        max(0, last_step - first.step) * num_micro_batches,
        num_workers=cfg.data.num_workers,
        pin_memory=_on_cuda(cfg),
    )
    ledger = LineLog(ledger_path)
    failed_in_a_row = 0
    cursor = first
    while cursor.step < last_step:
        progress.phase("planning", step=cursor.step + 1)
        packs = plan.step_packs(cursor)
        progress.phase(WAITING_FOR_DATA)
        mine = [next(loaded) for _ in range(num_micro_batches)]
        progress.packs([key for one in mine for key in one.batch.sample_keys])
        ledger.append(_ledger_lines(cursor, [entry for one in mine for entry in one.failed]))
        for one in mine:
            failed_keys = {entry.key for entry in one.failed}
            for key in one.batch.media_keys:
                failed_in_a_row = failed_in_a_row + 1 if key in failed_keys else 0
                if failed_in_a_row >= cfg.data.max_consecutive_failed:
                    raise TooManyFailed(
                        f"step {cursor.step + 1}: {failed_in_a_row} samples failed one after the other, the last of "
                        f"them {key}; data.max_consecutive_failed={cfg.data.max_consecutive_failed} stops the run "
                        f"there. {ledger_path} lists keys and reasons. Restore the files and resume the run, or raise "
                        "the limit"
                    )
        num_tokens, num_patches = (
            sum(pack.num_tokens for pack in packs),
            sum(pack.num_patches for pack in packs),
        )
        yield StepBatches(
            cursor=cursor,
            batches=[one.batch for one in mine],
            num_supervised_tokens=sum(pack.num_supervised_tokens for pack in packs),
            num_tokens=num_tokens,
            num_patches=num_patches,
            num_samples=sum(len(pack.samples) for pack in packs),
            is_blank=data_wait.is_given_up,
            fill=max(num_tokens / plan.step.max_tokens, num_patches / plan.step.max_patches) / len(packs),
        )
        cursor = plan.advance(cursor)


def evaluation_batches(
    data: OpenData,
    cfg: TrainConfig,
    rank: int,
    dp_size: int,
    *,
    share_prefix: bool = False,
    tell: Callable[[FailedEntry], object] = lambda _: None,
) -> Iterator[Batch]:
    """All samples that fit a pack, once over all ranks together, in as many batches on each rank.

    A rank with fewer packs than the others ends with filler. ``share_prefix``: samples of a family have one prefix, as
    ``data.max_family_records`` says. ``tell`` gets each sample of this rank that failed, which has no answer in its
    pack.
    """
    step = dataclasses.replace(data.plan.step, global_packs=dp_size, max_samples=None)
    most = cfg.data.max_family_records if share_prefix else 1
    once = dataclasses.replace(data.index.sample_table(), weights=(1.0,) * len(data.index.sizes))
    data = dataclasses.replace(data, plan=Plan(once, 0, step, costs=data.plan.costs, max_family_records=most))
    dataset = _dataset(data, cfg, Cursor(), rank, dp_size)
    count = data.plan.steps_in_epoch(0)
    for one in load_packs(dataset, count, num_workers=cfg.data.num_workers, pin_memory=_on_cuda(cfg)):
        for entry in one.failed:
            tell(entry)
        yield one.batch


def _dataset(data: OpenData, cfg: TrainConfig, first: Cursor, rank: int, dp_size: int) -> PackDataset:
    return PackDataset(
        data=data,
        first=first,
        rank=rank,
        dp_size=dp_size,
        loss_chunk_tokens=cfg.machine.loss_chunk_tokens,
    )


def _on_cuda(cfg: TrainConfig) -> bool:
    return cfg.machine.device.value != "cpu" and torch.cuda.is_available()


def _ledger_lines(cursor: Cursor, entries: list[FailedEntry]) -> list[str]:
    return [json_text({"step": cursor.step + 1, **entry._asdict()}) for entry in entries]
