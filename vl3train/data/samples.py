"""One sample: measured for the index, rendered for a pack, or stood in for when it turned out bad."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from vl3train.contracts.geometry import picture_grid, token_budget_pixels
from vl3train.contracts.records import BadSample, RenderedSample, RenderSettings, SampleLengths
from vl3train.contracts.tokens import IGNORE_INDEX, PATCH_VALUES
from vl3train.data.conversation import Conversation, Image, Stream, Video, visual_items
from vl3train.data.foreign import open_conversation
from vl3train.data.media import (
    ClipPlan,
    DecodeLimits,
    UnexpectedFrames,
    decode_image,
    image_size,
    plan_clip,
    read_frames,
)
from vl3train.data.patches import prune_mask, prune_to_count, resize_and_patchify
from vl3train.data.tokens import ChatTokenizer, ItemTokens, render_conversation

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class _Item:
    """A visual item whose size is known and whose pixels are not decoded yet."""

    data: bytes
    grid: tuple[int, int, int]  # patches along time, height, width
    merge_size: int
    clip: ClipPlan | None  # None: an image

    @property
    def times(self) -> tuple[float, ...]:
        return self.clip.times if self.clip else ()

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def num_tokens(self) -> int:
        """Visual tokens before pruning."""
        return self.num_patches // self.merge_size**2


def measure_sample(
    conversation_bytes: bytes,
    parts: Mapping[str, bytes],
    settings: RenderSettings,
    tokenizer: ChatTokenizer,
    limits: DecodeLimits,
) -> SampleLengths:
    """What the plan needs to know. Images give their header only; clips are decoded where frames are pruned.

    Raises:
        BadSample: it cannot be rendered. Damage behind an image's header shows only in ``render_sample``.
    """
    conversation = open_conversation(conversation_bytes, parts)

    def measure(exact: bool) -> SampleLengths:
        items = _lay_out(conversation, parts, settings, limits, exact)
        masks = []
        for item in items:
            if settings.prune_frames and item.grid[0] > 1:
                patches = _space([item])
                _write_patches(item, limits, patches)
                masks.append(prune_mask(patches, item.grid, item.merge_size))
            else:
                masks.append(np.ones(item.num_tokens, bool))
        text = render_conversation(conversation, _item_tokens(items, masks), tokenizer)
        num_supervised_tokens = int((text.labels != IGNORE_INDEX).sum())
        if not num_supervised_tokens:
            raise BadSample("no supervised token: the assistant says nothing")
        return _lengths(items, masks, len(text.input_ids), num_supervised_tokens)

    return _by_packets_else_exact(measure)


def render_sample(
    conversation_bytes: bytes,
    parts: Mapping[str, bytes],
    settings: RenderSettings,
    tokenizer: ChatTokenizer,
    limits: DecodeLimits,
    *,
    key: str,
    source: int,
    planned: SampleLengths | None,
    space: np.ndarray | None = None,
) -> RenderedSample:
    """Decode and tokenize one sample. With ``planned`` its lengths are the plan's, or it is refused.

    Of a pruned clip exactly the planned number of tokens is kept, so that another decoder's rounding cannot
    break a pack.

    Args:
        space: (planned.num_patches, 588) uint8 that the patches are written to; None: a new array.

    Raises:
        BadSample: the sample is damaged, or its lengths are not those that were planned.
    """
    conversation = open_conversation(conversation_bytes, parts)

    def render(exact: bool) -> RenderedSample:
        items = _lay_out(conversation, parts, settings, limits, exact)
        if planned is not None:
            _compare("grids", planned.grids, tuple(item.grid for item in items))
            _compare("merge sizes", planned.merge_sizes, tuple(item.merge_size for item in items))
        patches = _space(items) if space is None else space
        masks, start = [], 0
        for number, item in enumerate(items):
            values = patches[start : start + item.num_patches]
            start += item.num_patches
            _write_patches(item, limits, values)
            if not settings.prune_frames or item.grid[0] == 1:
                masks.append(np.ones(item.num_tokens, bool))
            elif planned is None:
                masks.append(prune_mask(values, item.grid, item.merge_size))
            else:
                masks.append(_pruned_as_planned(values, item, planned.kept_tokens[number]))
        text = render_conversation(conversation, _item_tokens(items, masks), tokenizer)
        found = _lengths(items, masks, len(text.input_ids), int((text.labels != IGNORE_INDEX).sum()))
        if planned is not None:
            for field in dataclasses.fields(SampleLengths):
                _compare(field.name, getattr(planned, field.name), getattr(found, field.name))
        return RenderedSample(
            key=key,
            source=source,
            input_ids=text.input_ids,
            labels=text.labels,
            patches=patches,
            grids=np.array(found.grids, np.int64).reshape(-1, 3),
            merge_sizes=np.array(found.merge_sizes, np.int64),
            keep_mask=np.concatenate([np.empty(0, bool), *masks]),
            placeholder_positions=text.placeholder_positions,
        )

    return _by_packets_else_exact(render)


def blank_sample(planned: SampleLengths, *, key: str, source: int) -> RenderedSample:
    """Stands in for a bad sample: the planned lengths, zero patches, no supervised token."""
    masks = [np.empty(0, bool)]
    for grid, merge_size, kept in zip(planned.grids, planned.merge_sizes, planned.kept_tokens, strict=True):
        masks.append(np.arange(grid[0] * grid[1] * grid[2] // merge_size**2) < kept)
    return RenderedSample(
        key=key,
        source=source,
        input_ids=np.zeros(planned.num_tokens, np.int64),
        labels=np.full(planned.num_tokens, IGNORE_INDEX, np.int64),
        patches=np.zeros((planned.num_patches, PATCH_VALUES), np.uint8),
        grids=np.array(planned.grids, np.int64).reshape(-1, 3),
        merge_sizes=np.array(planned.merge_sizes, np.int64),
        keep_mask=np.concatenate(masks),
        placeholder_positions=np.arange(planned.num_visual_tokens, dtype=np.int64),
    )


def _by_packets_else_exact(make: Callable[[bool], Made]) -> Made:
    """Trust the number of frames that packets tell; where decoding proves it wrong, count by decoding."""
    try:
        return make(False)
    except UnexpectedFrames:
        return make(True)


def _lay_out(
    conversation: Conversation,
    parts: Mapping[str, bytes],
    settings: RenderSettings,
    limits: DecodeLimits,
    exact: bool,
) -> list[_Item]:
    """Sizes of all visual items. All images and frames of the sample share its budget of visual tokens."""
    contents = visual_items(conversation)
    if missing := sorted({content.part for content in contents} - set(parts)):
        raise BadSample(f"the conversation needs {missing}; the sample has {sorted(parts)}")
    clips = [
        None if isinstance(content, Image) else _plan(content, parts[content.part], settings, limits, exact)
        for content in contents
    ]
    num_pictures = sum(len(clip.times) if clip else 1 for clip in clips)
    items = []
    for content, clip in zip(contents, clips, strict=True):
        data = parts[content.part]
        if clip is None:
            num_frames, (height, width) = 1, image_size(data, limits)
            merge_size = settings.image_merge_size
            least, most = settings.image_min_pixels, settings.image_max_pixels
        else:
            num_frames, height, width = len(clip.times), clip.height, clip.width
            merge_size = settings.video_merge_size
            least, most = settings.video_min_pixels, settings.video_max_pixels // num_frames
        budget = token_budget_pixels(
            max_visual_tokens=settings.max_visual_tokens, num_pictures=num_pictures, merge_size=merge_size
        )
        try:
            grid = picture_grid(
                height, width, merge_size=merge_size, min_pixels=least, max_pixels=min(most, budget)
            )
        except ValueError as error:
            raise BadSample(f"{content.part}: {error}") from error
        items.append(_Item(data, (num_frames, *grid), merge_size, clip))
    return items


def _plan(
    content: Video | Stream, data: bytes, settings: RenderSettings, limits: DecodeLimits, exact: bool
) -> ClipPlan:
    """Which frames of a clip are shown; of a streamed clip none after its last message (train.py:332)."""
    plan = plan_clip(
        data,
        fps=settings.fps,
        min_frames=settings.min_frames,
        max_frames=settings.max_frames,
        limits=limits,
        start_seconds=content.start,
        end_seconds=content.end,
        exact=exact,
    )
    if isinstance(content, Video):
        return plan
    count = sum(seconds <= content.until for seconds in plan.times)
    if not count:
        raise BadSample(f"{content.part}: no frame comes before the last message, at {content.until} s")
    return dataclasses.replace(plan, times=plan.times[:count], picked=plan.picked[:count])


def _space(items: list[_Item]) -> np.ndarray:
    return np.empty((sum(item.num_patches for item in items), PATCH_VALUES), np.uint8)


def _write_patches(item: _Item, limits: DecodeLimits, out: np.ndarray) -> None:
    """Fill (P, 588) uint8. Frames are shrunk one by one: a long clip is never in memory at its own size."""
    grid = item.grid[1:]
    if item.clip is None:
        picture = decode_image(item.data, limits)
        resize_and_patchify(picture, grid=grid, merge_size=item.merge_size, out=out)
        return
    frames = out.reshape(item.grid[0], -1, PATCH_VALUES)
    for number, frame in enumerate(read_frames(item.data, item.clip)):
        resize_and_patchify(frame, grid=grid, merge_size=item.merge_size, out=frames[number])


def _pruned_as_planned(patches: np.ndarray, item: _Item, count: int) -> np.ndarray:
    try:
        return prune_to_count(patches, item.grid, item.merge_size, count)
    except ValueError as error:
        raise BadSample(f"{error}; index the shards again") from error


def _item_tokens(items: list[_Item], masks: list[np.ndarray]) -> list[ItemTokens]:
    return [
        ItemTokens(tuple(int(kept) for kept in mask.reshape(item.grid[0], -1).sum(axis=1)), item.times)
        for item, mask in zip(items, masks, strict=True)
    ]


def _lengths(
    items: list[_Item], masks: list[np.ndarray], num_tokens: int, num_supervised_tokens: int
) -> SampleLengths:
    kept = tuple(int(mask.sum()) for mask in masks)
    kinds = sorted({"video" if item.clip else "image" for item in items})
    return SampleLengths(
        num_tokens=num_tokens,
        num_supervised_tokens=num_supervised_tokens,
        num_visual_tokens=sum(kept),
        num_patches=sum(item.num_patches for item in items),
        grids=tuple(item.grid for item in items),
        merge_sizes=tuple(item.merge_size for item in items),
        kept_tokens=kept,
        modality="mixed" if len(kinds) > 1 else kinds[0] if kinds else "text",
    )


def _compare(what: str, planned: object, found: object) -> None:
    if planned != found:
        raise BadSample(f"{what}: planned {planned}, found {found}; index the shards again")
