"""Sizes, frames and times equal transformers' on any input."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import VideoLlama3ImageProcessor, VideoLlama3VideoProcessor
from transformers.models.video_llama_3 import image_processing_video_llama_3 as upstream
from transformers.video_utils import VideoMetadata

from vl3train.contracts.geometry import (
    frame_indices,
    picture_grid,
    smart_resize,
    time_text,
    token_budget_pixels,
)

VIDEO = VideoLlama3VideoProcessor()
IMAGE = VideoLlama3ImageProcessor()
SIDES = st.integers(1, 5000)
RATES = st.one_of(
    st.sampled_from([10.0, 24.0, 25.0, 29.97, 30.0, 30000 / 1001, 59.94, 60.0, 12.5]), st.floats(1.0, 240.0)
)


@settings(max_examples=500, deadline=None)
@given(SIDES, SIDES, st.sampled_from([14, 28]), st.integers(1, 20_000), st.integers(196, 12_845_056))
@example(1080, 1920, 14, 3136, 3_211_264)
@example(7, 7, 28, 12_544, 3_000)
def test_smart_resize_equals_transformers(height, width, factor, min_pixels, max_pixels):
    limits = {"factor": factor, "min_pixels": min_pixels, "max_pixels": max_pixels}
    if max(height, width) / min(height, width) > 200:
        with pytest.raises(ValueError, match="aspect ratio"):
            smart_resize(height, width, **limits)
    else:
        assert smart_resize(height, width, **limits) == upstream.smart_resize(height, width, **limits)


@settings(max_examples=100, deadline=None)
@given(st.integers(20, 2000), st.integers(20, 2000), st.sampled_from([1, 2]))
def test_patches_of_a_picture_equal_transformers(height, width, merge_size):
    limits = {"min_pixels": 3136, "max_pixels": 3_211_264}
    rows, columns = picture_grid(height, width, merge_size=merge_size, **limits)
    expected = IMAGE.get_number_of_image_patches(height, width, {"merge_size": merge_size, **limits})
    assert rows * columns == expected
    assert rows % merge_size == columns % merge_size == 0


@settings(max_examples=1000, deadline=None)
@given(
    st.integers(1, 40_000),
    RATES,
    st.sampled_from([0.5, 1.0, 2.0, 24.0]),
    st.integers(1, 8),
    st.integers(1, 180),
)
@example(551, 10.0, 0.5, 1, 7)  # 551 / (551 / 7) is a little over 7 in floats: an eighth frame, number 551
@example(10, 25.0, 1.0, 4, 180)
@example(3, 25.0, 1.0, 4, 180)
@example(100, 25.0, 1.0, 8, 2)
def test_sampled_frames_equal_transformers(num_frames, source_fps, fps, min_frames, max_frames):
    metadata = VideoMetadata(total_num_frames=num_frames, fps=source_fps)
    rule = {"fps": fps, "min_frames": min_frames, "max_frames": max_frames}
    expected = VIDEO.sample_frames(metadata, **rule).tolist()
    if expected[-1] == num_frames:  # a frame that does not exist: transformers fails on reading it
        expected.pop()
    assert frame_indices(num_frames, source_fps, **rule) == expected


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 10_000_000), RATES, st.integers(1, 500))
def test_sampled_frames_exist_and_rise(num_frames, source_fps, max_frames):
    picked = frame_indices(num_frames, source_fps, fps=1.0, min_frames=1, max_frames=max_frames)
    assert picked[0] == 0
    assert all(earlier < later for earlier, later in pairwise(picked))
    assert picked[-1] < num_frames
    assert len(picked) <= max_frames


def test_a_clip_without_frames_is_refused():
    with pytest.raises(ValueError, match="without frames"):
        frame_indices(0, 25.0, fps=1.0, min_frames=1, max_frames=180)


@given(st.floats(0, 10_000))
def test_time_text_is_the_processors(seconds):
    assert time_text(seconds) == f"Time {seconds:.1f}s:"


@given(st.integers(1, 20_000), st.integers(1, 500), st.sampled_from([1, 2]))
def test_pictures_of_the_shared_budget_stay_within_it(max_visual_tokens, num_pictures, merge_size):
    pixels = token_budget_pixels(
        max_visual_tokens=max_visual_tokens, num_pictures=num_pictures, merge_size=merge_size
    )
    assert pixels // (14 * merge_size) ** 2 * num_pictures <= max_visual_tokens
