"""Patches and the pruning mask equal transformers' processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import VideoLlama3ImageProcessor, VideoLlama3VideoProcessor

from tests.data.conftest import drawn_picture, still_and_moving
from vl3train.contracts.geometry import picture_grid
from vl3train.contracts.tokens import PATCH_VALUES
from vl3train.data.media.patches import prune_mask, prune_to_count, resize_and_patchify

VIDEO = VideoLlama3VideoProcessor()


@pytest.mark.parametrize("merge_size", [1, 2])
@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (37, 61), (100, 33), (56, 56), (224, 140), (301, 517), (20, 900)]
)
def test_image_patches_equal_transformers(height, width, merge_size):
    size = {"shortest_edge": 3136, "longest_edge": 60_000}
    picture = drawn_picture(height, width)
    expected = VideoLlama3ImageProcessor(size=size, merge_size=merge_size)(
        Image.fromarray(picture), return_tensors="pt"
    )
    grid = picture_grid(height, width, merge_size=merge_size, min_pixels=3136, max_pixels=60_000)
    assert expected["image_grid_thw"].tolist() == [[1, *grid]]
    patches = resize_and_patchify(picture, grid=grid, merge_size=merge_size)
    assert patches.dtype == np.uint8
    torch.testing.assert_close(
        torch.from_numpy(patches) / 127.5 - 1, expected["pixel_values"], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("merge_size", [1, 2])
def test_clip_patches_and_mask_equal_transformers(merge_size):
    clip = np.stack(still_and_moving(5, 97, 131))
    size = {"shortest_edge": 12544, "longest_edge": 100_000}
    expected = VideoLlama3VideoProcessor(size=size, merge_size=merge_size)(
        torch.from_numpy(clip).permute(0, 3, 1, 2), return_tensors="pt", do_sample_frames=False
    )
    grid = picture_grid(97, 131, merge_size=merge_size, min_pixels=12544, max_pixels=100_000 // 5)
    assert expected["video_grid_thw"].tolist() == [[5, *grid]]
    patches = resize_and_patchify(clip, grid=grid, merge_size=merge_size)
    torch.testing.assert_close(
        torch.from_numpy(patches) / 127.5 - 1, expected["pixel_values_videos"], atol=1e-4, rtol=0
    )
    mask = prune_mask(patches, (5, *grid), merge_size)
    np.testing.assert_array_equal(mask, expected["video_compression_mask"].numpy())
    assert 0.2 < mask.mean() < 0.9


def transformers_mask(patches: np.ndarray, grid: tuple[int, int, int], merge_size: int) -> np.ndarray:
    pixels = torch.from_numpy(patches).float() / 127.5 - 1
    return VIDEO._get_compression_mask(pixels, torch.tensor([grid]), torch.tensor([merge_size])).numpy()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 5), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2]), st.integers(0, 10**6)
)
def test_mask_equals_transformers_around_the_threshold(frames, rows, columns, merge_size, seed):
    grid = (frames, rows * merge_size, columns * merge_size)
    random = np.random.default_rng(seed)
    values = PATCH_VALUES * merge_size**2
    tokens = random.integers(0, 200, (1, rows * columns, values)).repeat(frames, axis=0).astype(np.uint8)
    boundary = values / 20  # sum of differences where keeping starts
    for frame in range(1, frames):
        tokens[frame] = tokens[frame - 1]
        for token in range(rows * columns):
            changed = int(random.choice([0, boundary * 0.9, boundary - 1, boundary + 1, boundary * 2]))
            tokens[frame, token, random.permutation(values)[:changed]] += 1
    patches = tokens.reshape(-1, PATCH_VALUES)
    np.testing.assert_array_equal(
        prune_mask(patches, grid, merge_size), transformers_mask(patches, grid, merge_size)
    )


def test_a_still_clip_keeps_one_token_a_frame():
    patches = np.tile(np.arange(16 * PATCH_VALUES).reshape(16, -1).astype(np.uint8), (4, 1))
    mask = prune_mask(patches, (4, 4, 4), 2).reshape(4, 4)
    assert mask.tolist() == [[True] * 4] + [[True, False, False, False]] * 3
    np.testing.assert_array_equal(mask.reshape(-1), transformers_mask(patches, (4, 4, 4), 2))


def test_images_and_single_frames_keep_all():
    assert prune_mask(np.zeros((16, PATCH_VALUES), np.uint8), (1, 4, 4), 2).tolist() == [True] * 4


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.integers(0, 10**6), st.floats(0, 1))
def test_any_planned_count_can_be_kept(frames, seed, share):
    random = np.random.default_rng(seed)
    patches = random.integers(0, 3, (frames * 6, PATCH_VALUES)).astype(np.uint8)
    patches[6:12] = patches[:6]
    grid, total = (frames, 2, 3), frames * 6
    least = 6 + frames - 1
    count = round(least + share * (total - least))
    mask = prune_to_count(patches, grid, 1, count).reshape(frames, 6)
    assert mask.sum() == count
    assert mask[0].all()
    assert mask.any(axis=1).all()
    np.testing.assert_array_equal(mask.reshape(-1), prune_to_count(patches, grid, 1, count))


def test_the_measured_count_gives_the_measured_mask_and_fewer_keeps_the_most_changed():
    patches = np.zeros((2 * 4, PATCH_VALUES), np.uint8)
    patches[4:] = np.array([0, 5, 9, 5], np.uint8)[:, None]
    assert prune_to_count(patches, (2, 2, 2), 1, 7).tolist() == [True] * 4 + [False, True, True, True]
    assert prune_to_count(patches, (2, 2, 2), 1, 6).tolist() == [True] * 4 + [False, True, True, False]
    assert prune_to_count(patches, (2, 2, 2), 1, 5).tolist() == [True] * 4 + [False, False, True, False]
    for count in (4, 9):
        with pytest.raises(ValueError, match="cannot keep"):
            prune_to_count(patches, (2, 2, 2), 1, count)
