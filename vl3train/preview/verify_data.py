"""The checks of ``vl3train verify`` on a user's samples. Each gives a verdict with reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from vl3train.config.problems import counted
from vl3train.contracts.records import Cursor, Pack, RenderedSample, SampleError
from vl3train.contracts.tokens import IGNORE_INDEX, IM_END, IM_START, STREAM_END, STREAM_START
from vl3train.data.render.chat_tokens import ChatTokenizer
from vl3train.preview.step_samples import rendered, text_pieces

if TYPE_CHECKING:
    from vl3train.data.loader import OpenData
    from vl3train.data.render.decode_client import Decoder

REASONS_SHOWN = 5
FAMILY_SAMPLES = 4
"""Most samples of a family that are compared with themselves alone."""
STREAM_PIECES = (STREAM_START, STREAM_END, IM_START)
"""Supervised beside the answers of a streaming record, by ``data.stream_supervision``."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of one check."""

    name: str
    passed: bool
    found: str
    reasons: list[str] = field(default_factory=list)


def drawn_rows(data: OpenData, count: int, seed: int) -> list[int]:
    """Up to ``count`` rows of the index, drawn without repetition."""
    total = data.index.num_samples
    return np.random.default_rng(seed).permutation(total)[:count].tolist()


def check_decoding(
    data: OpenData, rows: Sequence[int], decoder: Decoder
) -> tuple[Verdict, dict[int, RenderedSample]]:
    """Whether samples can be read, decoded and rendered to the lengths in the index; and those that can, by row."""
    good: dict[int, RenderedSample] = {}
    reasons = []
    for row in rows:
        sample = rendered(data, row, decoder)
        if isinstance(sample, SampleError):
            reasons.append(f"{data.index.key(row)}: {sample}")
        else:
            good[row] = sample
    found = (
        f"{len(good)} of {counted(len(rows), 'sample')} drawn at random decode to the lengths in the index"
    )
    return Verdict("decoding", not reasons, found, reasons), good


def first_family(data: OpenData, decoder: Decoder) -> list[RenderedSample]:
    """Samples of the first step that share a prefix, each by itself; fewer than two where there are none.

    Those that cannot be used are left out.
    """
    groups = (group for pack in data.plan.step_packs(Cursor()) for group in pack.groups if len(group) > 1)
    found = (rendered(data, row, decoder) for row in next(groups, ())[:FAMILY_SAMPLES])
    return [sample for sample in found if not isinstance(sample, SampleError)]


def check_labels(data: OpenData, samples: Mapping[int, RenderedSample], tokenizer: ChatTokenizer) -> Verdict:
    """Whether exactly the assistant's text, and the end token after it, is supervised; beside it only what
    ``data.stream_supervision`` adds to streamed frames. Reads the shards once more."""
    from vl3train.data.records.conversation import Text, is_learned
    from vl3train.data.records.shard_records import open_conversation

    reasons, seen = [], 0
    for row, sample in samples.items():
        key = data.index.key(row)
        turns = open_conversation(*data.index.read_sample(row)).turns
        streamed = STREAM_PIECES if any(turn.role == "stream" for turn in turns) else ()
        said = [
            "".join(content.text for content in turn.content if isinstance(content, Text)) + IM_END
            for turn in turns
            if is_learned(turn)
        ]
        pieces = [piece.text for piece in text_pieces(sample, tokenizer) if piece.supervised]
        asked = [text for text in pieces if text.strip() not in streamed]
        seen += 1
        # The tokenizer may join a leading space to the newline before it, which is not the assistant's text.
        if [text.strip() for text in asked] != [text.strip() for text in said]:
            reasons.append(f"{key}: supervised {asked[:2]!r}, the assistant says {said[:2]!r}")
        if (sample.labels != IGNORE_INDEX).sum() == 0:
            reasons.append(f"{key}: no token is supervised")
        if np.isin(sample.placeholder_positions, np.flatnonzero(sample.labels != IGNORE_INDEX) + 1).any():
            reasons.append(f"{key}: a visual token is supervised")
    found = f"exactly the assistant's words and {IM_END} are supervised in {counted(seen, 'sample')}"
    if reasons:
        found = f"{counted(len(reasons), 'fault')} in what is supervised of {counted(seen, 'sample')}"
    if seen < len(samples):
        found += "; the others are captions without turns to compare with"
    return Verdict("labels", not reasons, found, reasons)


def check_splits(data: OpenData) -> Verdict:
    """Whether any number of ranks has the same packs in the first step, and an epoch has each sample once."""
    from vl3train.data.plan.costs import rank_packs

    plan, reasons = data.plan, []
    packs = plan.step_packs(Cursor())
    worlds = [size for size in range(1, len(packs) + 1) if len(packs) % size == 0]
    whole = sorted(pack.samples for pack in packs)
    for world in worlds:
        shares: list[Pack] = [pack for rank in range(world) for pack in rank_packs(packs, rank, world)]
        if sorted(pack.samples for pack in shares) != whole:
            reasons.append(f"with {world} ranks the step has other samples")
    for pack in packs:
        if pack.num_tokens > plan.step.max_tokens or pack.num_patches > plan.step.max_patches:
            reasons.append(f"a pack holds {pack.num_tokens} tokens and {pack.num_patches} patches")
    of_source, families = data.index.source, plan.table.families
    groups = [group for pack in packs for group in pack.groups if len(group) > 1]
    for group in groups:
        assert families is not None, "without them no samples share a prefix"
        if len({(of_source(row), int(families[row])) for row in group}) > 1:
            reasons.append(f"{data.index.key(group[0])}: samples of other media share its prefix")
    rows, counts = np.unique(plan.epoch_rows(0), return_counts=True)
    expected, bound = data.index.num_samples - len(plan.oversized_samples), plan.order.max_epoch_samples
    if all(weight == 1 for weight in plan.table.weights) and (bound is None or expected <= bound):
        twice, never = int((counts > 1).sum()), expected - len(rows)
        if twice or never:
            reasons.append(f"{twice} samples are twice in an epoch, {never} never")
    found = f"{counted(len(packs), 'pack')} can be divided without change over {', '.join(map(str, worlds))}"
    found += " rank" if worlds == [1] else " ranks"
    if groups:
        found += f"; {sum(map(len, groups))} of its samples are in {len(groups)} families, which share a prefix each"
    return Verdict("splits", not reasons, found, reasons)
