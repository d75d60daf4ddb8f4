"""Records of the same media, rendered with them decoded once: a prefix, and a branch for the rest of each record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vl3train.contracts.records import RenderedSample, RenderSettings, SampleError, SampleLengths
from vl3train.contracts.tokens import IGNORE_INDEX, PATCH_VALUES
from vl3train.data.media.clips import DecodeLimits
from vl3train.data.render.chat_tokens import ChatTokenizer, RenderedText, render_conversation
from vl3train.data.render.samples import blank_sample, compare_all, opened, render_with_items

PREFIX_KEY = "prefix"
NO_SOURCE = -1
"""A prefix is no sample: losses and answers are those of its branches."""


class FamilyRecord(NamedTuple):
    """One record of a family, as it comes from a shard."""

    conversation: bytes
    parts: Mapping[str, bytes]  # by name; only the first record's media have their bytes
    planned: SampleLengths | None = None  # None: it is to be measured


def render_family(
    first: FamilyRecord,
    others: Sequence[FamilyRecord],
    settings: RenderSettings,
    tokenizer: ChatTokenizer,
    limits: DecodeLimits,
    *,
    space: np.ndarray,
) -> tuple[RenderedSample, list[RenderedText]]:
    """The first record whole, and the texts of the others with the same visual tokens.

    Raises:
        SampleError: one of them is damaged, or its lengths are not those that were planned.
    """
    planned = first.planned
    sample, items = render_with_items(
        first.conversation, first.parts, settings, tokenizer, limits, key="", planned=planned, space=space
    )
    texts = []
    for other in others:
        assert planned is not None, "families are planned"
        assert other.planned is not None, "families are planned"
        conversation = opened(other.conversation, other.parts)
        text = render_conversation(conversation, items, tokenizer, settings.stream_supervision)
        shared = text.prefix_tokens
        found = dataclasses.replace(
            planned,
            num_tokens=len(text.input_ids),
            num_supervised_tokens=int((text.labels != IGNORE_INDEX).sum()),
            prefix_tokens=shared,
        )
        compare_all(other.planned, found)
        if not np.array_equal(text.input_ids[:shared], sample.input_ids[: planned.prefix_tokens]):
            raise SampleError("records of one family begin with different tokens; index the shards again")
        texts.append(text)
    return sample, texts


def cut_family(
    sample: RenderedSample, texts: Sequence[tuple[np.ndarray, np.ndarray]], keys: Sequence[str], shared: int
) -> list[RenderedSample]:
    """The prefix of a rendered sample, and branches: its own, and those of others.

    Args:
        sample: rendered whole.
        texts: ids and labels of the others.
        keys: of all records.
        shared: tokens of the prefix.
    """
    prefix = dataclasses.replace(
        sample,
        key=PREFIX_KEY,
        source=NO_SOURCE,
        input_ids=sample.input_ids[:shared],
        labels=sample.labels[:shared],
    )
    branches = [
        _branch(key, sample.source, ids[shared:], labels[shared:], shared)
        for key, (ids, labels) in zip(keys, [(sample.input_ids, sample.labels), *texts], strict=True)
    ]
    return [prefix, *branches]


def blank_family(
    planned: Sequence[SampleLengths], *, keys: Sequence[str], source: int
) -> list[RenderedSample]:
    """Stands in for a failed family: the planned lengths, zero patches, no supervised token; one record is alone."""
    sample = blank_sample(planned[0], key=keys[0], source=source)
    if len(planned) == 1:
        return [sample]
    texts = [
        (np.zeros(one.num_tokens, np.int64), np.full(one.num_tokens, IGNORE_INDEX, np.int64))
        for one in planned[1:]
    ]
    return cut_family(sample, texts, keys, planned[0].prefix_tokens)


def _branch(key: str, source: int, ids: np.ndarray, labels: np.ndarray, shared: int) -> RenderedSample:
    return RenderedSample(
        key=key,
        source=source,
        input_ids=ids,
        labels=labels,
        patches=np.empty((0, PATCH_VALUES), np.uint8),
        grids=np.empty((0, 3), np.int64),
        merge_sizes=np.empty(0, np.int64),
        keep_mask=np.empty(0, bool),
        placeholder_positions=np.empty(0, np.int64),
        num_shared_tokens=shared,
    )
