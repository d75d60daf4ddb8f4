"""The buffers of one rank under a new layout, filled from a checkpoint of another; and why that may not be possible."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vl3train.engine.zero.reshard.layouts import (
    Groups,
    Layout,
    Piece,
    buffer_size,
    buffers_of,
    pieces_of_shard,
)
from vl3train.engine.zero.reshard.shards import MASTER, STEP, Shards


def own_buffers(shards: Shards, layout: Layout, groups: Groups, rank: int) -> list[dict[str, Any]]:
    """MASTER and AdamW's state of each buffer of a rank, (values,) each; padding is zero, as DeepSpeed's is."""
    own: dict[int, list[Piece]] = {}
    for piece in pieces_of_shard(layout, groups, rank if layout.zero_stage else 0):
        own.setdefault(piece.buffer, []).append(piece)
    return [
        _fill(shards, group, buffer_size(layout, group), own.get(number, []))
        for number, group in enumerate(buffers_of(layout, groups))
    ]


def problems(shards: Shards, layout: Layout, groups: Groups) -> list[str]:
    """Why the state cannot take another layout, a line each."""
    saved = {name: size for group in shards.groups for name, size in group.items()}
    now = {name: size for group in groups for name, size in group.items()}
    found = [
        f"{name}: the checkpoint trains {_count(saved.get(name))}, this run {_count(now.get(name))}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]
    if not found:
        for group in buffers_of(layout, groups):
            steps = {name: _step(shards.state_of(name)) for name in group}
            if len(set(steps.values())) > 1:
                few, *_, many = sorted(steps, key=lambda name: steps[name])
                found.append(
                    f"{few} has had {steps[few]} updates, and {many} {steps[many]}: "
                    f"under machine.zero_stage={layout.zero_stage} they would share one count"
                )
    if not found:
        return []
    way_out = f"Go on with {shards.layout}, or start a new run from the checkpoint's weights"
    return [f"the state in {shards.folder} cannot be moved to {layout}:", *found, way_out]


def _count(size: int | None) -> str:
    return "no values of it" if size is None else f"{size:,} values of it"


def _step(state: Mapping[str, Any]) -> int:
    return int(state.get(STEP, 0))


def _fill(shards: Shards, group: Mapping[str, int], size: int, pieces: list[Piece]) -> dict[str, Any]:
    any_name = next(iter(group))
    state = shards.state_of(any_name)
    filled: dict[str, Any] = {}
    for what in (MASTER, *(name for name in state if name != STEP)):
        buffer = torch.zeros(size, dtype=shards.dtype_of(any_name, what))
        for piece in pieces:
            shards.read_into(buffer[piece.offset : piece.offset + piece.size], piece.name, piece.start, what)
        filled[what] = buffer
    if STEP in state:
        step = state[STEP]
        filled[STEP] = step.clone() if isinstance(step, Tensor) else step
    return filled
