"""Random samples in the mix that every figure of benchmarks/one_gpu.py is taken on, as real packs.

15 % text of 100 to 1500 tokens, 70 % an image of 256 to 4900 patches, 15 % a clip of 8 to 40 frames of 256 to 600
patches; merge size 2 but for stage 1. An image or clip is asked about in 20 to 60 tokens and answered in 20 to 200;
half of a text is supervised. Samples are drawn once from the seed and laid into packs in the order drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vl3train.contracts.records import Batch, Pack, RenderedSample
from vl3train.contracts.tokens import IGNORE_INDEX, PATCH_VALUES
from vl3train.data.collate import collate

LOSS_CHUNK_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Sizes that samples are drawn from, both ends included, and where the special ids lie."""

    text_tokens: tuple[int, int] = (100, 1500)
    image_patches: tuple[int, int] = (256, 4900)
    clip_frames: tuple[int, int] = (8, 40)
    frame_patches: tuple[int, int] = (256, 600)
    first_special_id: int = 151643
    image_pad_id: int = 151655
    video_pad_id: int = 151656
    blank: bool = False  # all patches zero, which is quicker drawn


PUBLISHED = Mix()
TINY = Mix(
    text_tokens=(20, 80),
    image_patches=(16, 100),
    clip_frames=(2, 4),
    frame_patches=(16, 36),
    first_special_id=900,
    image_pad_id=1000,
    video_pad_id=1001,
)
"""For the two-layer model that tests run on a CPU."""


def draw_sample(
    rng: np.random.Generator, *, image_merge_size: int, max_tokens: int, mix: Mix = PUBLISHED
) -> RenderedSample:
    """One sample of the mix."""
    kind = rng.choice(["text", "image", "clip"], p=[0.15, 0.70, 0.15])

    def between(bounds: tuple[int, int]) -> int:
        return int(rng.integers(bounds[0], bounds[1] + 1))

    if kind == "text":
        frames, patches, merge = 0, 0, 1
        num_text = between(mix.text_tokens)
        num_supervised = num_text // 2
    else:
        frames = between(mix.clip_frames) if kind == "clip" else 1
        patches = between(mix.frame_patches if kind == "clip" else mix.image_patches)
        merge = 2 if kind == "clip" else image_merge_size
        num_supervised = between((20, 200))
        num_text = between((20, 60)) + num_supervised
    grids = np.zeros((0, 3), np.int64)
    if frames:
        height = max(2, round(patches**0.5 * float(rng.uniform(0.7, 1.4)) / 2) * 2)
        width = max(2, round(patches / height / 2) * 2)
        grids = np.array([[frames, height, width]], np.int64)
    num_visual = int(grids.prod(axis=1).sum()) // merge**2
    if num_visual + num_text > max_tokens:
        return draw_sample(rng, image_merge_size=image_merge_size, max_tokens=max_tokens, mix=mix)
    return _drawn(rng, kind, grids, merge, num_text, num_supervised, mix)


def draw_text(rng: np.random.Generator, num_tokens: int, mix: Mix = PUBLISHED) -> RenderedSample:
    """A text of ``num_tokens``, half of it supervised."""
    return _drawn(rng, "text", np.zeros((0, 3), np.int64), 1, num_tokens, num_tokens // 2, mix)


def _drawn(
    rng: np.random.Generator,
    kind: str,
    grids: np.ndarray,
    merge: int,
    num_text: int,
    num_supervised: int,
    mix: Mix,
) -> RenderedSample:
    num_patches = int(grids.prod(axis=1).sum())
    num_visual, shape = num_patches // merge**2, (num_patches, PATCH_VALUES)
    pad = mix.video_pad_id if kind == "clip" else mix.image_pad_id
    input_ids = np.concatenate([np.full(num_visual, pad), rng.integers(0, mix.first_special_id, num_text)])
    labels = np.full(len(input_ids), IGNORE_INDEX, np.int64)
    if num_supervised:
        labels[-num_supervised - 1 : -1] = input_ids[-num_supervised:]
    return RenderedSample(
        key=f"drawn/{kind}",
        source=0,
        input_ids=input_ids.astype(np.int64),
        labels=labels,
        patches=np.zeros(shape, np.uint8) if mix.blank else rng.integers(0, 256, shape, np.uint8),
        grids=grids,
        merge_sizes=np.full(len(grids), merge, np.int64),
        keep_mask=np.ones(num_visual, bool),
        placeholder_positions=np.arange(num_visual),
    )


def draw_packs(
    count: int,
    *,
    max_tokens: int = 16384,
    image_merge_size: int = 2,
    seed: int = 0,
    mix: Mix = PUBLISHED,
    fill: bool = False,
) -> list[list[RenderedSample]]:
    """``count`` packs of at most ``max_tokens`` language-model tokens, in the order drawn.

    With ``fill`` a text takes what is left of each, so that it has ``max_tokens``.
    """
    rng = np.random.default_rng(seed)
    packs: list[list[RenderedSample]] = [[]]
    room = max_tokens
    while True:
        sample = draw_sample(rng, image_merge_size=image_merge_size, max_tokens=max_tokens, mix=mix)
        if len(sample.input_ids) > room:
            if fill and room:
                packs[-1].append(draw_text(rng, room, mix))
            if len(packs) == count:
                return packs
            packs.append([])
            room = max_tokens
        packs[-1].append(sample)
        room -= len(sample.input_ids)


def pack_batch(samples: list[RenderedSample]) -> Batch:
    """The tensors of one pack, through the project's own collate."""
    num_supervised = sum(int((sample.labels != IGNORE_INDEX).sum()) for sample in samples)
    pack = Pack(
        samples=tuple(range(len(samples))),
        num_tokens=sum(len(sample.input_ids) for sample in samples),
        num_patches=sum(len(sample.patches) for sample in samples),
        num_supervised_tokens=num_supervised,
        cost=0,
    )
    return collate(samples, pack, num_loss_chunks=max(1, -(-num_supervised // LOSS_CHUNK_TOKENS)))
