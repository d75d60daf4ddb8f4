"""The prompts of a pack in one forward pass over all of them: keys, values and what follows each prompt.

A pack of evaluation holds whole samples, answers included. A row sees only rows before it, so the keys and values up to
where an answer begins are those of its prompt alone. One pass thus serves every answer of a conversation, and
gives the loss of the true answers beside them. Samples of a family have one prefix, which is in the pack once.

T tokens, U supervised tokens, A answers, L layers, H hidden size, Hkv key and value heads, D values a head.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vl3train.contracts.families import family_lengths
from vl3train.contracts.records import Batch
from vl3train.model.attention.backends import attend, make_segments
from vl3train.model.generation.layer import layer_rows
from vl3train.model.packed_forward import PackedModel


class Prompt(NamedTuple):
    """Where one answer of a pack begins. Its prompt is everything before, in its segment."""

    segment: int
    answer: int  # number of the answer in its segment: 0 is the first
    rows: tuple[slice, ...]  # of the prompt's tokens in the pack: of a prefix that it shares, and of its own
    length: int  # T of the prompt; the answer's first token comes after it
    first_label: int  # number of the answer's first token among the U supervised ones
    true_ids: tuple[int, ...]  # the recorded answer, its end token included


@dataclass(frozen=True, slots=True)
class Prefilled:
    """What a pack's forward pass leaves for decoding."""

    prompts: list[Prompt]
    states: Tensor  # (U, H), final hidden states at the supervised positions
    keys_values: Tensor  # (L, 2, T, Hkv, D)


def find_prompts(batch: Batch) -> list[Prompt]:
    """The answers of a pack: runs of supervised tokens that follow each other in one segment. For a batch on the host.

    Samples without a supervised token, as failed ones, have none.
    """
    rows, labels = batch.supervised_positions.tolist(), batch.supervised_labels.tolist()
    segments, starts = batch.supervised_segments.tolist(), batch.cu_seqlens.tolist()
    prefixes = prefixes_of(batch)
    bounds = [
        i for i, row in enumerate(rows) if i == 0 or row != rows[i - 1] + 1 or segments[i] != segments[i - 1]
    ]
    prompts: list[Prompt] = []
    for first, end in zip(bounds, [*bounds[1:], len(rows)], strict=True):
        segment = segments[first]
        own = slice(starts[segment], rows[first] + 1)
        of_prompt = (*prefixes.get(segment, ()), own)
        follows = bool(prompts) and prompts[-1].segment == segment
        prompts.append(
            Prompt(
                segment=segment,
                answer=prompts[-1].answer + 1 if follows else 0,
                rows=of_prompt,
                length=sum(piece.stop - piece.start for piece in of_prompt),
                first_label=first,
                true_ids=tuple(labels[first:end]),
            )
        )
    return prompts


def prefixes_of(batch: Batch) -> dict[int, tuple[slice]]:
    """The rows of the prefix of each segment that is a branch."""
    bounds = [0, *itertools.accumulate(batch.segment_lengths)]
    return {
        branch: (slice(bounds[segment], bounds[segment + 1]),)
        for segment, count in enumerate(batch.num_branches)
        for branch in range(segment + 1, segment + 1 + count)
    }


@torch.no_grad()
def prefill(model: PackedModel, batch: Batch, prompts: list[Prompt]) -> Prefilled:
    """One forward pass over a pack on the model's device; ``prompts`` are ``find_prompts`` of it."""
    hidden = model.embedded(batch)
    language_model = model.model.model.language_model
    cos_1TD, sin_1TD = language_model.rotary_emb(hidden.unsqueeze(0), batch.position_ids.unsqueeze(0))
    segments = make_segments(
        batch.cu_seqlens,
        batch.segment_lengths,
        hidden.shape[0],
        model.attention,
        compiled=False,
        shared=batch.shared_prefixes,
        branches=[tokens for _, tokens in family_lengths(batch.segment_lengths, batch.num_branches)],
    )
    kept: list[Tensor] = []
    for layer in language_model.layers:

        def causal(q: Tensor, k: Tensor, v: Tensor, scale: float = layer.self_attn.scaling) -> Tensor:
            kept.append(torch.stack((k, v)))
            return attend(q, k, v, segments, causal=True, scale=scale)

        last = layer is language_model.layers[-1]
        rows = batch.supervised_positions if last else None
        hidden = layer_rows(layer, hidden, cos_1TD.squeeze(0), sin_1TD.squeeze(0), causal, rows)
    states = language_model.norm(hidden)
    return Prefilled(prompts, states, torch.stack(kept))
