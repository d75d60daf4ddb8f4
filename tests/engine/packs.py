"""Random samples and packs for engine tests: lengths and grids as real ones, words and pixels random."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from vl3train.contracts.records import Batch, Pack, RenderedSample
from vl3train.contracts.tokens import IGNORE_INDEX, PATCH_VALUES
from vl3train.data.collate import collate
from vl3train.data.render.families import cut_family


def random_samples(config: Any, count: int, seed: int = 0) -> list[RenderedSample]:
    """Two texts, an image (merge 1) and a clip (merge 2, pruned) in turn: dealt to four packs, two are text only."""
    rng = np.random.default_rng(seed)
    return [_sample(rng, config, number) for number in range(count)]


def _sample(rng: np.random.Generator, config: Any, number: int) -> RenderedSample:
    kind = [0, 0, 1, 2][number % 4]
    grids = [[], [[1, 2, 3]], [[2, 2, 4]]][kind]
    merge = [0, 1, 2][kind]
    merged = sum(t * h * w for t, h, w in grids) // max(merge, 1) ** 2
    keep_mask = np.ones(merged, dtype=bool)
    if kind == 2:
        keep_mask[-1] = False
    visual = int(keep_mask.sum())
    text = int(rng.integers(4, 12))
    pad = config.image_token_id if kind == 1 else config.video_token_id
    words = rng.integers(10, 200, size=text)
    input_ids = np.concatenate([np.full(visual, pad), words]).astype(np.int64)
    labels = np.full(len(input_ids), IGNORE_INDEX, dtype=np.int64)
    supervised = int(rng.integers(1, text - 1))
    labels[-supervised - 1 : -1] = input_ids[-supervised:]
    return RenderedSample(
        key=f"shard/{number}",
        source=number % 2,
        input_ids=input_ids,
        labels=labels,
        patches=rng.integers(
            0, 256, size=(sum(t * h * w for t, h, w in grids), PATCH_VALUES), dtype=np.uint8
        ),
        grids=np.array(grids, dtype=np.int64).reshape(-1, 3),
        merge_sizes=np.full(len(grids), merge, dtype=np.int64),
        keep_mask=keep_mask,
        placeholder_positions=np.arange(visual, dtype=np.int64),
    )


def with_others(samples: list[RenderedSample]) -> list[list[RenderedSample]]:
    """Each sample with another record of its media, which has other words behind them; a text stays alone."""
    rng = np.random.default_rng(1)
    found = []
    for sample in samples:
        visual = len(sample.placeholder_positions)
        words = rng.integers(10, 200, size=len(sample.input_ids) - visual + 3)
        ids = np.concatenate([sample.input_ids[:visual], words])
        labels = np.full(len(ids), IGNORE_INDEX, np.int64)
        labels[-3:-1] = ids[-2:]
        other = replace(sample, key=f"{sample.key}#1", input_ids=ids, labels=labels)
        found.append([sample, other] if visual else [sample])
    return found


def behind_a_prefix(records: list[RenderedSample]) -> list[RenderedSample]:
    """The records as a family, whose prefix ends with the last visual token; one alone as it is."""
    first, *others = records
    if not others:
        return records
    texts = [(other.input_ids, other.labels) for other in others]
    return cut_family(first, texts, [one.key for one in records], len(first.placeholder_positions))


def collate_samples(samples: list[RenderedSample]) -> Batch:
    """One pack of the given samples."""
    pack = Pack(
        samples=tuple(range(len(samples))),
        num_tokens=sum(len(s.input_ids) for s in samples),
        num_patches=sum(len(s.patches) for s in samples),
        num_supervised_tokens=sum(int((s.labels != IGNORE_INDEX).sum()) for s in samples),
        cost=0,
    )
    return collate(samples, pack, num_loss_chunks=1)
