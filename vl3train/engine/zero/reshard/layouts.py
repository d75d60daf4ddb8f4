"""Which values of which parameter lie where: in which flat buffer of which rank. Pure arithmetic.

An optimizer group is a mapping of parameter names to their numbers of values, in DeepSpeed's order. What DeepSpeed
0.19.8 makes of a group:

- stage 0: a tensor for each parameter, whole on every rank;
- stages 1 and 2: one buffer of all parameters end to end, padded to a multiple of twice the number of ranks, and cut
  into as many equal parts;
- stage 3: each parameter is cut by itself, into parts of ceil(values / ranks), and the parts of a rank lie end to end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Groups = Sequence[Mapping[str, int]]
"""For each buffer of stages 1 to 3 the parameters in it, with their numbers of values. Stage 0 has other buffers."""

ALIGNMENT = 2
"""Values; DeepSpeed starts what NCCL sends at 4 bytes, and counts with two bytes a value for all types."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How optimizer state is divided."""

    dp_size: int
    zero_stage: int

    def __str__(self) -> str:
        return f"machine.dp_size={self.dp_size} machine.zero_stage={self.zero_stage}"

    @property
    def num_shards(self) -> int:
        """How many ranks have a share of their own; in stage 0 all have the same."""
        return self.dp_size if self.zero_stage else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Consecutive values of one parameter in one buffer of one rank."""

    name: str
    start: int  # of the parameter's values, the first that is here
    size: int
    shard: int  # the rank; 0 in stage 0
    buffer: int  # its number on that rank
    offset: int  # in the buffer


def pieces_of_shard(layout: Layout, groups: Groups, shard: int) -> list[Piece]:
    """What lies on one rank, in the order of its buffers.

    >>> groups = [{"a": 5, "b": 4}]
    >>> [(p.name, p.start, p.size, p.offset) for p in pieces_of_shard(Layout(dp_size=2, zero_stage=1), groups, 1)]
    [('b', 1, 3, 0)]
    >>> [(p.name, p.start, p.size, p.offset) for p in pieces_of_shard(Layout(dp_size=2, zero_stage=3), groups, 1)]
    [('a', 3, 2, 0), ('b', 2, 2, 3)]
    """
    found = []
    for buffer, group in enumerate(buffers_of(layout, groups)):
        at = 0  # in the whole buffer of stages 0 to 2, in this rank's of stage 3
        share = buffer_size(layout, group)
        for name, size in group.items():
            if layout.zero_stage == 3:
                part = _part(layout, size)
                first, end, offset = min(size, shard * part), min(size, (shard + 1) * part), at
                at += part
            else:
                first = max(0, shard * share - at)
                end = min(size, (shard + 1) * share - at)
                offset = at + first - shard * share
                at += size
            if first < end:
                found.append(
                    Piece(name=name, start=first, size=end - first, shard=shard, buffer=buffer, offset=offset)
                )
    return found


def buffers_of(layout: Layout, groups: Groups) -> Groups:
    """The parameters of each buffer that a rank has."""
    if layout.zero_stage:
        return groups
    return [{name: size} for group in groups for name, size in group.items()]


def buffer_size(layout: Layout, group: Mapping[str, int]) -> int:
    """Values of one buffer on each rank, padding among them."""
    if layout.zero_stage == 0:
        return sum(group.values())
    if layout.zero_stage == 3:
        return sum(_part(layout, size) for size in group.values())
    aligned = ALIGNMENT * layout.dp_size
    return -(-sum(group.values()) // aligned) * ALIGNMENT


def _part(layout: Layout, size: int) -> int:
    return -(-size // layout.dp_size)
