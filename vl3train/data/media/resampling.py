"""A picture that changes its size by a little, resized and cut into patches in one pass. Compiled.

Most images are: their sides are rounded to whole patches, a few pixels up or down. Then neighbours in the result
have the same place relative to neighbours in the source, but for a few places where it moves by a pixel; between
them both passes are products of arrays, which the compiler turns into vector instructions.

Equal to the bit to torch's bicubic with antialias on uint8 (aten/src/ATen/native/cpu/UpSampleKernel.cpp, after
Pillow's Resample.c): first along rows, then along columns, each value rounded to uint8; weights are integers over a
power of two. Here they are float32, and as exact: every sum is a whole number of those units, under 2**24.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from vl3train.data.compiled import njit
from vl3train.data.media.resampling_kernels import TAPS, cut_whole, resample

MEAN_RUN = 20
"""Shorter runs between moves than this many columns, and torch is faster."""


class Resampling(NamedTuple):
    """How one side is resampled: value ``i`` is made of the pixels from ``starts[i]`` on, by ``weights[:, i]``."""

    starts: np.ndarray  # (n,) int64, may be outside of the picture where weights are zero
    weights: np.ndarray  # (TAPS, n) float32
    taps: int  # 4, or 5 where the last weights are not all zero
    long_runs: bool  # whether as columns they are for ``resample_into_patches``


@lru_cache(256)
def resampling(size: int, new_size: int) -> Resampling | None:
    """The weights from ``size`` to ``new_size`` pixels; None where a value has more than TAPS of them."""
    starts, weights, taps = _weigh(size, new_size)
    runs = 1 + int(np.count_nonzero(np.diff(starts) != 1))
    return Resampling(starts, weights, taps, new_size >= MEAN_RUN * runs) if taps else None


def resample_into_patches(
    picture: np.ndarray, rows: Resampling, columns: Resampling, merge_size: int, out: np.ndarray
) -> None:
    """Resize (h, w, 3) uint8 and fill ``out``, (patches, 588) uint8 contiguous, in the order of patches.py."""
    pixels, halves = np.ascontiguousarray(picture).reshape(-1), out.reshape(-1).view(np.uint16)
    height, width = picture.shape[:2]
    resample(pixels, height, width, rows, columns, merge_size, halves)


def cut_into_patches(picture: np.ndarray, merge_size: int, out: np.ndarray) -> None:
    """As ``resample_into_patches``, of a picture that has its size."""
    pixels, halves = np.ascontiguousarray(picture).reshape(-1), out.reshape(-1).view(np.uint16)
    cut_whole(pixels, picture.shape[0], picture.shape[1], merge_size, halves)


@njit(cache=True, nogil=True)
def _cubic(x):
    """Keys' kernel with a = -0.5, in torch's order of operations."""
    x = abs(x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return 0.0


@njit(cache=True, nogil=True)
def _weigh(size, new_size):
    """``Resampling``'s fields; taps is 0 where there are too many."""
    starts = np.empty(new_size, np.int64)
    placed = np.zeros((TAPS, new_size), np.float32)
    if size == new_size:
        for i in range(new_size):
            starts[i], placed[0, i] = i, 1.0
        return starts, placed, 4
    scale = size / new_size
    support = 2.0 * max(scale, 1.0)
    most = int(np.ceil(support)) * 2 + 1
    if scale > 1.3:
        return starts, placed, 0
    weights, first = np.zeros((new_size, most)), np.empty(new_size, np.int64)
    for i in range(new_size):
        center, total = scale * (i + 0.5), 0.0
        first[i] = max(int(center - support + 0.5), 0)
        for j in range(min(int(center + support + 0.5), size) - first[i]):
            weights[i, j] = _cubic((j + first[i] - center + 0.5) * (1.0 / max(scale, 1.0)))
            total += weights[i, j]
        for j in range(most):
            weights[i, j] /= total
    precision, top = 0, weights.max()
    while precision < 22 and int(0.5 + top * (1 << (precision + 1))) < 1 << 15:
        precision += 1
    unit, taps = 1 << precision, 4
    low, high = np.empty(new_size, np.int64), np.empty(new_size, np.int64)
    for i in range(new_size):
        low[i], high[i], magnitude = most, -1, 0
        for j in range(most):
            value = weights[i, j] * unit
            whole = int(value - 0.5 if value < 0 else value + 0.5)
            weights[i, j] = whole / unit
            magnitude += abs(whole)
            if whole:
                low[i], high[i] = min(low[i], j), j
        taps = max(taps, high[i] - low[i] + 1)
        if taps > TAPS or magnitude * 255 + unit >= 1 << 24:
            return starts, placed, 0
    for i in range(new_size):
        # One pixel on from the value before, if its weights allow: few moves.
        latest = first[i] + low[i]
        earliest = first[i] + high[i] - taps + 1
        starts[i] = min(max(starts[i - 1] + 1, earliest), latest) if i else latest
        for j in range(low[i], high[i] + 1):
            placed[first[i] + j - starts[i], i] = weights[i, j]
    return starts, placed, taps
