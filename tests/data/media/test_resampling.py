"""Compiled resampling equals torch's to the bit, whatever the sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vl3train.contracts.tokens import PATCH_SIZE, PATCH_VALUES
from vl3train.data.media.patches import resize_and_patchify
from vl3train.data.media.resampling import resample_into_patches, resampling
from vl3train.data.media.resampling_kernels import STRIP


def by_torch(picture: np.ndarray, grid: tuple[int, int], merge_size: int) -> np.ndarray:
    """The definition: torch's resize, then patches by views."""
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None]
    size = (grid[0] * PATCH_SIZE, grid[1] * PATCH_SIZE)
    resized = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False, antialias=True)[0]
    cut = resized.reshape(
        *(3, grid[0] // merge_size, merge_size, PATCH_SIZE, grid[1] // merge_size, merge_size, PATCH_SIZE)
    )
    return cut.permute(1, 4, 2, 5, 0, 3, 6).reshape(-1, PATCH_VALUES).numpy()


def noisy(height: int, width: int, seed: int) -> np.ndarray:
    """Noise; for odd seeds black and white, which overshoots both ends of a byte."""
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return (picture > 127).astype(np.uint8) * 255 if seed % 2 else picture


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 400), st.integers(8, 700), st.sampled_from([1, 2]), st.integers(0, 10**6))
@example(56, 2000, 1, 1)
@example(2000, 60, 2, 2)
@example(15, STRIP + 20, 1, 3)
def test_small_changes_equal_torch(height, width, merge_size, seed):
    grid = [max(1, round(side / PATCH_SIZE / merge_size)) * merge_size for side in (height, width)]
    patches = resize_and_patchify(noisy(height, width, seed), grid=(grid[0], grid[1]), merge_size=merge_size)
    np.testing.assert_array_equal(
        patches, by_torch(noisy(height, width, seed), (grid[0], grid[1]), merge_size)
    )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 300), st.integers(1, 300), st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6)
)
@example(1, 1, 1, 1, 1)
def test_any_change_equals_torch(height, width, rows, columns, seed):
    picture = noisy(height, width, seed)
    expected = by_torch(picture, (rows, columns), 1)
    np.testing.assert_array_equal(resize_and_patchify(picture, grid=(rows, columns), merge_size=1), expected)
    along = resampling(height, rows * PATCH_SIZE), resampling(width, columns * PATCH_SIZE)
    if along[0] and along[1]:  # also where torch would be faster
        found = np.zeros_like(expected)
        resample_into_patches(picture, along[0], along[1], 1, found)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("merge_size", [1, 2])
def test_every_width_of_photographs_equals_torch(merge_size):
    """Each width and what it is rounded to, up or down: every table of weights that images use."""
    for width in range(200, 1300, 7 if merge_size == 1 else 13):
        for side in (width // PATCH_SIZE // merge_size, width // PATCH_SIZE // merge_size + 1):
            picture, grid = noisy(20, width, width), (merge_size, side * merge_size)
            np.testing.assert_array_equal(
                resize_and_patchify(picture, grid=grid, merge_size=merge_size),
                by_torch(picture, grid, merge_size),
            )


def test_the_compiled_way_is_taken_for_photographs_and_torch_for_large_changes():
    for width in range(300, 2000, 11):
        new = round(width / PATCH_SIZE) * PATCH_SIZE
        columns = resampling(width, new)
        assert columns is not None, width
        assert columns.long_runs, width
    assert resampling(4000, 1022) is None
    upward = resampling(100, 140)
    assert upward is not None
    assert not upward.long_runs
