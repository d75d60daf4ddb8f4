"""One sample: measured for the index, rendered for a pack, or replaced by a blank one of its lengths when it failed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from vl3train.contracts.records import RenderedSample, RenderSettings, SampleError, SampleLengths
from vl3train.contracts.tokens import IGNORE_INDEX, PATCH_VALUES
from vl3train.data.media.clips import DecodeLimits
from vl3train.data.media.patches import prune_mask, prune_to_count
from vl3train.data.records.conversation import (
    EMPTY_ANSWER,
    Conversation,
    has_empty_answer,
    nothing_to_learn,
    visual_items,
)
from vl3train.data.records.families import digest_of_bytes, family_number
from vl3train.data.records.shard_records import open_conversation
from vl3train.data.render.chat_tokens import ChatTokenizer, ItemTokens, RenderedText, render_conversation
from vl3train.data.render.visual_items import (
    Item,
    by_packets_else_exact,
    lay_out,
    patch_space,
    picture_remarks,
    write_patches,
)

Seen = dict[tuple[object, ...], tuple[np.ndarray, tuple[str, ...]]]
"""Of each visual item, by its part and how it is shown: which merged tokens are kept, and remarks."""


def measure_sample(
    conversation_bytes: bytes,
    parts: Mapping[str, bytes],
    settings: RenderSettings,
    tokenizer: ChatTokenizer,
    limits: DecodeLimits,
    *,
    decode: bool = False,
    remarks: set[str] | None = None,
    seen: Seen | None = None,
) -> SampleLengths:
    """What the plan needs to know. Images are decoded where their file does not look whole, clips where frames are
    pruned.

    Args:
        decode: decode every image and clip whole: damage inside compressed data is found now, not in the run.
        remarks: what is odd or lost is added here; of images as far as they are decoded, else by their headers.
        seen: what was found of each item of the same parts: it is not decoded again, and what is new is added.

    Raises:
        SampleError: it cannot be rendered. Without ``decode`` damage inside an image's compressed data shows only in
            ``render_sample``.
    """
    conversation = opened(conversation_bytes, parts)

    noted: set[str] = set() if remarks is None else remarks
    known: Seen = {} if seen is None else seen
    if has_empty_answer(conversation.turns):
        noted.add(EMPTY_ANSWER)

    def measure(exact: bool) -> SampleLengths:
        items = lay_out(conversation, parts, settings, limits, exact)
        masks = []
        for part, item in zip((one.part for one in visual_items(conversation)), items, strict=True):
            shown = (part, item.grid, item.merge_size, item.times)
            if shown not in known:
                known[shown] = _looked_at(item, settings, limits, decode)
            mask, found = known[shown]
            masks.append(mask)
            noted.update(found)
        text = render_conversation(
            conversation, _item_tokens(items, masks), tokenizer, settings.stream_supervision
        )
        lengths = _lengths(items, masks, text)
        if not lengths.prefix_tokens:
            return lengths
        return dataclasses.replace(lengths, family=family_number(conversation, digest_of_bytes(parts)))

    return by_packets_else_exact(measure)


def _looked_at(
    item: Item, settings: RenderSettings, limits: DecodeLimits, decode: bool
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Which merged tokens of an item are kept, and what is odd or lost of it."""
    remarks = () if item.header is None else picture_remarks(item, limits, decode)
    pruned = settings.prune_frames and item.grid[0] > 1
    if pruned or (decode and item.clip is not None):
        patches = patch_space([item])
        write_patches(item, limits, patches)
    if pruned:
        return prune_mask(patches, item.grid, item.merge_size), remarks
    return np.ones(item.num_tokens, bool), remarks


def render_sample(
    conversation_bytes: bytes,
    parts: Mapping[str, bytes],
    settings: RenderSettings,
    tokenizer: ChatTokenizer,
    limits: DecodeLimits,
    *,
    key: str,
    planned: SampleLengths | None,
    space: np.ndarray | None = None,
) -> RenderedSample:
    """Decode and tokenize one sample. With ``planned``, other lengths than the plan's are an error.

    Of a pruned clip exactly the planned number of tokens is kept, so that another decoder's rounding cannot break a
    pack. The sample's ``source`` is 0: ``decode_client.Decoder.render`` sets it.

    Args:
        space: (planned.num_patches, 588) uint8 that the patches are written to; None: a new array.

    Raises:
        SampleError: the sample is damaged, or its lengths are not those that were planned.
    """
    return render_with_items(
        conversation_bytes, parts, settings, tokenizer, limits, key=key, planned=planned, space=space
    )[0]


def render_with_items(
    conversation_bytes: bytes,
    parts: Mapping[str, bytes],
    settings: RenderSettings,
    tokenizer: ChatTokenizer,
    limits: DecodeLimits,
    *,
    key: str,
    planned: SampleLengths | None,
    space: np.ndarray | None = None,
) -> tuple[RenderedSample, list[ItemTokens]]:
    """``render_sample``, and what the text needs to know of its items."""
    conversation = opened(conversation_bytes, parts)

    def render(exact: bool) -> tuple[RenderedSample, list[ItemTokens]]:
        items = lay_out(conversation, parts, settings, limits, exact)
        if planned is not None:
            _compare("grids", planned.grids, tuple(item.grid for item in items))
            _compare("merge sizes", planned.merge_sizes, tuple(item.merge_size for item in items))
        patches = patch_space(items) if space is None else space
        masks, start = [], 0
        for number, item in enumerate(items):
            values = patches[start : start + item.num_patches]
            start += item.num_patches
            write_patches(item, limits, values)
            if not settings.prune_frames or item.grid[0] == 1:
                masks.append(np.ones(item.num_tokens, bool))
            elif planned is None:
                masks.append(prune_mask(values, item.grid, item.merge_size))
            else:
                masks.append(_pruned_as_planned(values, item, planned.kept_tokens[number]))
        tokens = _item_tokens(items, masks)
        text = render_conversation(conversation, tokens, tokenizer, settings.stream_supervision)
        found = _lengths(items, masks, text)
        if planned is not None:
            compare_all(planned, found)
        sample = RenderedSample(
            key=key,
            source=0,
            input_ids=text.input_ids,
            labels=text.labels,
            patches=patches,
            grids=np.array(found.grids, np.int64).reshape(-1, 3),
            merge_sizes=np.array(found.merge_sizes, np.int64),
            keep_mask=np.concatenate([np.empty(0, bool), *masks]),
            placeholder_positions=text.placeholder_positions,
        )
        return sample, tokens

    return by_packets_else_exact(render)


def blank_sample(planned: SampleLengths, *, key: str, source: int) -> RenderedSample:
    """Stands in for a failed sample: the planned lengths, zero patches, no supervised token."""
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


def opened(conversation_bytes: bytes, parts: Mapping[str, bytes]) -> Conversation:
    """The conversation of a sample of which something is learned.

    Raises:
        SampleError: it is in no known form, or nothing is learned of it.
    """
    conversation = open_conversation(conversation_bytes, parts)
    if reason := nothing_to_learn(conversation.turns):
        raise SampleError(reason)
    return conversation


def _pruned_as_planned(patches: np.ndarray, item: Item, count: int) -> np.ndarray:
    try:
        return prune_to_count(patches, item.grid, item.merge_size, count)
    except ValueError as error:
        raise SampleError(f"{error}; index the shards again") from error


def _item_tokens(items: list[Item], masks: list[np.ndarray]) -> list[ItemTokens]:
    return [
        ItemTokens(tuple(int(kept) for kept in mask.reshape(item.grid[0], -1).sum(axis=1)), item.times)
        for item, mask in zip(items, masks, strict=True)
    ]


def _lengths(items: list[Item], masks: list[np.ndarray], text: RenderedText) -> SampleLengths:
    kept = tuple(int(mask.sum()) for mask in masks)
    kinds = sorted({"video" if item.clip else "image" for item in items})
    return SampleLengths(
        num_tokens=len(text.input_ids),
        num_supervised_tokens=int((text.labels != IGNORE_INDEX).sum()),
        num_visual_tokens=sum(kept),
        num_patches=sum(item.num_patches for item in items),
        grids=tuple(item.grid for item in items),
        merge_sizes=tuple(item.merge_size for item in items),
        kept_tokens=kept,
        modality="mixed" if len(kinds) > 1 else kinds[0] if kinds else "text",
        prefix_tokens=text.prefix_tokens,
    )


def compare_all(planned: SampleLengths, found: SampleLengths) -> None:
    """Raise SampleError where a sample is not as it was measured."""
    for one in dataclasses.fields(SampleLengths):
        if one.compare:
            _compare(one.name, getattr(planned, one.name), getattr(found, one.name))


def _compare(what: str, planned: object, found: object) -> None:
    if planned != found:
        raise SampleError(f"{what}: planned {planned}, found {found}; index the shards again")
