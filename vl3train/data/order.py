"""In which order samples come: a pure function of the sources' sizes, their weights, the seed and the epoch.

A source is an endless stream: one permutation after another. A virtual epoch takes the next
``round(weight * size)`` entries of every stream and interleaves them evenly. At weight 1 that is every
sample exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def samples_per_epoch(num_samples: int, weight: float) -> int:
    """Entries a source gives to one virtual epoch; at least one, so that no source vanishes by rounding.

    >>> samples_per_epoch(1000, 0.5), samples_per_epoch(3, 0.01), samples_per_epoch(0, 1.0)
    (500, 1, 0)
    """
    return max(1, round(weight * num_samples)) if num_samples else 0


def stream_slice(num_samples: int, first: int, count: int, *, seed: int, source: int) -> np.ndarray:
    """Entries ``first`` to ``first + count`` of one source's stream, as numbers below ``num_samples``.

    Pass ``p`` of the stream is the permutation drawn from ``PCG64([seed, source, p])``.

    Returns:
        (count,) int64
    """
    pieces = [np.empty(0, np.int64)]
    position = first
    while position < first + count:
        number, offset = divmod(position, num_samples)
        permutation = np.random.Generator(np.random.PCG64([seed, source, number])).permutation(num_samples)
        piece = permutation[offset : offset + first + count - position]
        pieces.append(piece.astype(np.int64))
        position += len(piece)
    return np.concatenate(pieces)


def epoch_order(sizes: Sequence[int], weights: Sequence[float], *, seed: int, epoch: int) -> np.ndarray:
    """All entries of one virtual epoch; the sources' samples are numbered one source after the other.

    Entry i of a source that gives n entries stands at (i + 0.5) / n, so every stretch of the epoch holds the
    sources in proportion. Equal places go by source number.

    Returns:
        (sum of the sources' entries,) int64

    >>> epoch_order([4, 2], [1.0, 1.0], seed=0, epoch=0) >= 4   # where the second source's samples stand
    array([False,  True, False, False,  True, False])
    """
    rows, places, start = [np.empty(0, np.int64)], [np.empty(0)], 0
    for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        count = samples_per_epoch(size, weight)
        if count:
            taken = stream_slice(size, epoch * count, count, seed=seed, source=source)
            rows.append(start + taken)
            places.append((np.arange(count) + 0.5) / count)
        start += size
    return np.concatenate(rows)[np.argsort(np.concatenate(places), kind="stable")]
