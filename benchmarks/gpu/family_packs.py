"""Random records of the same clip or image, as packs of samples by themselves and as packs that share prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.data.packs import Mix
from vl3train.contracts.records import RenderedSample
from vl3train.contracts.tokens import IGNORE_INDEX, PATCH_VALUES
from vl3train.data.render.families import cut_family

Packs = list[list[RenderedSample]]


@dataclass(frozen=True, kw_only=True)
class FamilyMix:
    """One medium and what is asked about it, the same for all families but the shape of the frames."""

    records: int  # of each medium
    frames: int
    grids: tuple[
        tuple[int, int], ...
    ]  # rows and columns of patches, which families have in turn; merge size 2
    question: int  # tokens
    answer: int  # tokens, supervised
    aim: float  # times more records a second than without sharing


MIXES = {
    "clip_8": FamilyMix(
        records=8,
        frames=64,
        grids=(
            (14, 22),
            (12, 26),
            (22, 14),
            (10, 30),
        ),  # 4 800 to 4 992 visual tokens: three families fit a pack
        question=30,
        answer=20,
        aim=6.0,
    ),
    "image_4": FamilyMix(
        records=4, frames=1, grids=((40, 40), (32, 50), (50, 32)), question=0, answer=150, aim=2.2
    ),
}
TINY_MIXES = {
    "clip_8": FamilyMix(records=8, frames=4, grids=((4, 6), (6, 4)), question=6, answer=4, aim=6.0),
    "image_4": FamilyMix(records=4, frames=1, grids=((8, 10), (10, 8)), question=0, answer=15, aim=2.2),
}
"""For the two-layer model that runs on a CPU."""


def draw_family(rng: np.random.Generator, mix: FamilyMix, ids: Mix, number: int) -> list[RenderedSample]:
    """The records of one medium, each by itself; all show the same array of patches."""
    height, width = mix.grids[number % len(mix.grids)]
    grid = np.array([[mix.frames, height, width]], np.int64)
    num_patches = int(grid.prod())
    num_visual, shape = num_patches // 4, (num_patches, PATCH_VALUES)
    patches = np.zeros(shape, np.uint8) if ids.blank else rng.integers(0, 256, shape, np.uint8)
    return [
        _record(rng, mix, ids, f"family/{number}#{record}", grid, patches, num_visual)
        for record in range(mix.records)
    ]


def _record(
    rng: np.random.Generator,
    mix: FamilyMix,
    ids: Mix,
    key: str,
    grid: np.ndarray,
    patches: np.ndarray,
    num_visual: int,
) -> RenderedSample:
    pad = ids.video_pad_id if mix.frames > 1 else ids.image_pad_id
    text = rng.integers(0, ids.first_special_id, mix.question + mix.answer)
    input_ids = np.concatenate([np.full(num_visual, pad), text]).astype(np.int64)
    labels = np.full(len(input_ids), IGNORE_INDEX, np.int64)
    # The first answer token is predicted by the last question token; without a question the image's last visual token
    # would predict it, and a prefix has no supervised token: it is shared.
    first = len(input_ids) - mix.answer + (mix.question == 0)
    labels[first - 1 : -1] = input_ids[first:]
    return RenderedSample(
        key=key,
        source=0,
        input_ids=input_ids,
        labels=labels,
        patches=patches,
        grids=grid,
        merge_sizes=np.full(1, 2, np.int64),
        keep_mask=np.ones(num_visual, bool),
        placeholder_positions=np.arange(num_visual),
    )


def as_family(records: Sequence[RenderedSample]) -> list[RenderedSample]:
    """The same records behind one prefix: the prefix, and a branch for each."""
    first, *others = records
    texts = [(record.input_ids, record.labels) for record in others]
    return cut_family(first, texts, [record.key for record in records], len(first.keep_mask))


def draw_shared(
    count: int, *, mix: FamilyMix, ids: Mix, max_tokens: int, seed: int
) -> tuple[Packs, list[list[RenderedSample]]]:
    """``count`` full packs of families, and the records in them, family after family."""
    rng = np.random.default_rng(seed)
    packs: Packs = [[]]
    families: list[list[RenderedSample]] = []
    room = max_tokens
    while True:
        records = draw_family(rng, mix, ids, len(families))
        family = as_family(records)
        size = sum(len(segment.input_ids) for segment in family)
        if size > room:
            if len(packs) == count:
                return packs, families
            packs.append([])
            room = max_tokens
        packs[-1] += family
        families.append(records)
        room -= size


def apart(families: Sequence[Sequence[RenderedSample]], *, max_tokens: int, seed: int) -> Packs:
    """The records in an order that is drawn, each a sample by itself, as packs: all but the last are full."""
    records = [record for family in families for record in family]
    packs: Packs = [[]]
    room = max_tokens
    for number in np.random.default_rng(seed).permutation(len(records)):
        size = len(records[number].input_ids)
        if size > room:
            packs.append([])
            room = max_tokens
        packs[-1].append(records[number])
        room -= size
    return packs
