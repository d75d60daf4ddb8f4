"""Segments of a row that share a prefix: where prefix and branches lie, and what they attend to.

A *family* on a row is a segment that is a prefix, and behind it the segments that are its branches. ``num_branches``
says of each segment how many branches follow it: 0 for a branch, and for a sample that shares nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class FamilyRows(NamedTuple):
    """Rows of the prefixes and of their branches, family after family, and where those of each family end."""

    prefix_rows: np.ndarray  # (Q,) int64
    branch_rows: np.ndarray  # (R,) int64
    prefix_bounds: np.ndarray  # (F+1,) int64 into prefix_rows
    branch_bounds: np.ndarray  # (F+1,) int64 into branch_rows


def family_lengths(segment_lengths: Sequence[int], num_branches: Sequence[int]) -> list[tuple[int, int]]:
    """Tokens of the prefix of each family, and of its branches together.

    >>> family_lengths([7, 100, 3, 4], [0, 2, 0, 0])
    [(100, 7)]
    """
    return [
        (segment_lengths[i], sum(segment_lengths[i + 1 : i + 1 + count]))
        for i, count in enumerate(num_branches)
        if count
    ]


def family_rows(segment_lengths: Sequence[int], num_branches: Sequence[int]) -> FamilyRows:
    """The rows of prefixes and branches.

    >>> family_rows([1, 2, 1, 1], [0, 2, 0, 0])[:2]
    (array([1, 2]), array([3, 4]))
    """
    starts = np.concatenate([[0], np.cumsum(segment_lengths)]).astype(np.int64)
    firsts = [i for i, count in enumerate(num_branches) if count]
    lengths = family_lengths(segment_lengths, num_branches)
    nothing = np.zeros(0, np.int64)
    prefixes = [np.arange(starts[i], starts[i + 1]) for i in firsts]
    branches = [np.arange(starts[i + 1], starts[i + 1 + num_branches[i]]) for i in firsts]
    bounds = np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(lengths, 0).reshape(-1, 2)]).astype(
        np.int64
    )
    return FamilyRows(
        np.concatenate([nothing, *prefixes]), np.concatenate([nothing, *branches]), bounds[:, 0], bounds[:, 1]
    )


def doubled_pairs(segment_lengths: Sequence[int], num_branches: Sequence[int]) -> int:
    """Twice the pairs of a token and one that it attends to, itself counted half.

    Attention is causal in a segment, and each token of a branch attends to the whole prefix.

    >>> doubled_pairs([10], [0]), doubled_pairs([6, 4, 4], [2, 0, 0]) == 6 * 6 + 2 * (2 * 6 * 4 + 4 * 4)
    (100, True)
    """
    within = sum(length**2 for length in segment_lengths)
    return within + 2 * sum(
        prefix * tokens for prefix, tokens in family_lengths(segment_lengths, num_branches)
    )
