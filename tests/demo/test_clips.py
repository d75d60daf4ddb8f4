"""The demo's clips, read back from their H.264 files."""

from __future__ import annotations

import io
import itertools
import random

import av
import numpy as np
import pytest

from vl3train.demo.clips import DIRECTIONS, SOURCE_FPS, Clip, appearing_clip, encode, moving_clip
from vl3train.demo.scenes import COLOURS


def read(clip: Clip) -> tuple[list[float], list[np.ndarray]]:
    """Times in seconds and frames (height, width, 3) of the encoded clip."""
    with av.open(io.BytesIO(encode(clip))) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        frames = list(container.decode(stream))
        return [float(frame.pts * stream.time_base) for frame in frames], [
            frame.to_ndarray(format="rgb24") for frame in frames
        ]


def seen(frame: np.ndarray, colour: str) -> np.ndarray:
    """Where ``colour`` is; H.264 bends colours a little."""
    return np.abs(frame.astype(int) - COLOURS[colour]).max(axis=2) < 45


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_shape_moves_in_its_direction(direction: str) -> None:
    clip = moving_clip(random.Random(3), direction)
    _, frames = read(clip)
    colour = clip.frames[0].shapes[0].colour
    first, last = (np.argwhere(seen(frame, colour)).mean(axis=0) for frame in (frames[0], frames[-1]))
    down, right = last - first
    moved = {"left": -right, "right": right, "up": -down, "down": down}
    assert max(moved, key=lambda name: moved[name]) == direction
    assert moved[direction] > 20


@pytest.mark.parametrize("second", [1, 2, 3, 4])
def test_a_shape_appears_at_its_second(second: int) -> None:
    clip = appearing_clip(random.Random(second), ("red",), (second,), seconds=5)
    times, frames = read(clip)
    assert times == [number / SOURCE_FPS for number in range(10)]
    shown = (time for time, frame in zip(times, frames, strict=True) if seen(frame, "red").sum() > 50)
    assert next(shown) == second
    assert clip.description.count("Nothing.") == second


def test_frame_pruning_finds_the_still_frames() -> None:
    """H.264 bends pixels, but not by as much as frame pruning (DiffFP) takes for a change."""
    _, frames = read(appearing_clip(random.Random(0), ("blue",), (4,), seconds=5))
    taken = [frame.astype(int) for frame in frames[::SOURCE_FPS]]
    height, width = (side // 28 * 28 for side in taken[0].shape[:2])
    kept = []
    for before, frame in itertools.pairwise(taken):
        change = np.abs(frame - before).mean(axis=2)[:height, :width]
        blocks = change.reshape(height // 28, 28, width // 28, 28).mean(axis=(1, 3))
        kept.append(bool((2 * blocks > 0.1).any()))
    assert kept == [False, False, False, True]


def test_the_same_clip_is_the_same_file() -> None:
    first, second = (encode(moving_clip(random.Random(1), "up")) for _ in range(2))
    assert first == second
