"""In which order samples come: a pure function of the sources' sizes, their weights, the seed and the epoch.

A source is an endless stream: one permutation after another. A virtual epoch takes the next
``round(weight * size)`` entries of every stream and interleaves them evenly. At weight 1 that is every
sample exactly once. Where a bound is set on virtual epochs, every source gives the same smaller share of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class OrderRules:
    """What shapes the order besides seed and weights. As made without arguments it shapes nothing."""

    max_epoch_samples: int | None = None
    """Most samples of one virtual epoch."""
    block_shards: int = 0
    """0 shuffles all samples of a source. Else its shards are shuffled, and then the samples within windows of so
    many shards, so that a node reads few shards at a time."""


def samples_per_epoch(num_samples: int, weight: float) -> int:
    """Entries a source gives to one virtual epoch; at least one, so that no source vanishes by rounding.

    >>> samples_per_epoch(1000, 0.5), samples_per_epoch(3, 0.01), samples_per_epoch(0, 1.0)
    (500, 1, 0)
    """
    return max(1, round(weight * num_samples)) if num_samples else 0


def epoch_counts(sizes: Sequence[int], weights: Sequence[float], most: int | None) -> list[int]:
    """Entries that each source gives to one virtual epoch, of about ``most`` at the most.

    >>> epoch_counts([1000, 3000], [1.0, 0.5], None), epoch_counts([1000, 3000], [1.0, 0.5], 100)
    ([1000, 1500], [40, 60])
    """
    counts = [samples_per_epoch(size, weight) for size, weight in zip(sizes, weights, strict=True)]
    if most is None or sum(counts) <= most:
        return counts
    share = most / sum(counts)
    return [max(1, round(count * share)) if count else 0 for count in counts]


def permutation(
    num_samples: int, *, seed: int, source: int, number: int, shards: np.ndarray | None, block_shards: int
) -> np.ndarray:
    """Pass ``number`` over a source, drawn from ``PCG64([seed, source, number])``.

    Args:
        num_samples: of the source.
        seed: of the run.
        source: its number in the recipe.
        number: of the pass.
        shards: (num_samples,) shard of each sample; read only with ``block_shards``.
        block_shards: see ``OrderRules``.

    Returns:
        (num_samples,) int32, or int64 where there are more than 2**31 samples
    """
    rng = np.random.Generator(np.random.PCG64([seed, source, number]))
    order = np.arange(num_samples, dtype=np.int32 if num_samples < 2**31 else np.int64)
    rng.shuffle(order)
    if not block_shards:
        return order
    assert shards is not None, "block mode needs to know the shard of each sample"
    names, shard = np.unique(shards, return_inverse=True)
    window = (rng.permutation(len(names)) // block_shards).astype(np.int32)[shard]
    return order[np.argsort(window[order], kind="stable")]


def stream_slice(
    num_samples: int,
    first: int,
    count: int,
    *,
    seed: int,
    source: int,
    shards: np.ndarray | None = None,
    block_shards: int = 0,
) -> np.ndarray:
    """Entries ``first`` to ``first + count`` of one source's stream, as numbers below ``num_samples``.

    Returns:
        (count,) int32, or int64 where there are more than 2**31 samples
    """
    pieces = []
    position = first
    while position < first + count:
        number, offset = divmod(position, num_samples)
        whole = permutation(
            num_samples, seed=seed, source=source, number=number, shards=shards, block_shards=block_shards
        )
        pieces.append(whole[offset : offset + first + count - position])
        position += len(pieces[-1])
    return np.concatenate(pieces) if len(pieces) != 1 else pieces[0]


def epoch_order(
    sizes: Sequence[int],
    weights: Sequence[float],
    *,
    seed: int,
    epoch: int,
    rules: OrderRules = OrderRules(),
    shards: np.ndarray | None = None,
) -> np.ndarray:
    """All entries of one virtual epoch; the sources' samples are numbered one source after the other.

    Entry i of a source that gives n entries stands at (i + 0.5) / n, so every stretch of the epoch holds the
    sources in proportion. Equal places go by source number.

    Args:
        sizes: samples of each source.
        weights: of each source.
        seed: of the run.
        epoch: number of the virtual epoch.
        rules: bounds and locality.
        shards: (sum of sizes,) shard of each sample, for ``rules.block_shards``.

    Returns:
        (sum of the sources' entries,) int32, or int64 where there are more than 2**31 samples

    >>> epoch_order([4, 2], [1.0, 1.0], seed=0, epoch=0) >= 4   # where the second source's samples stand
    array([False,  True, False, False,  True, False])
    """
    dtype = np.int32 if sum(sizes) < 2**31 else np.int64
    counts = epoch_counts(sizes, weights, rules.max_epoch_samples)
    rows = np.empty(sum(counts), dtype)
    filled = start = 0
    for source, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        if count:
            stream = stream_slice(
                size,
                epoch * count,
                count,
                seed=seed,
                source=source,
                shards=None if shards is None else shards[start : start + size],
                block_shards=rules.block_shards,
            )
            np.add(stream, start, out=rows[filled : filled + count])
            filled += count
        start += size
    if sum(count > 0 for count in counts) < 2:
        return rows
    places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts if count])
    return rows[np.argsort(places, kind="stable")]
