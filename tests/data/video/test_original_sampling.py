"""``original`` is ffmpeg's filter ``fps=FPS:round=down``, which PyAV brings along: the reference here is the filter."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.conftest import LIMITS, still_and_moving
from vl3train.data.media.clips import decode_clip
from vl3train.data.video.frame_choice import choose_frames
from vl3train.data.video.timeline import FrameRule, Timeline


def through_the_filter(
    frames, tick: Fraction, *before: tuple[str, str], fps: str = "1"
) -> list[av.VideoFrame]:
    graph = av.filter.Graph()
    nodes = [
        graph.add_buffer(
            width=frames[0].width, height=frames[0].height, format=frames[0].format, time_base=tick
        ),
        *(graph.add(*one) for one in before),
        graph.add("fps", f"fps={fps}:round=down"),
        graph.add("buffersink"),
    ]
    graph.link_nodes(*nodes).configure()
    out = []
    for frame in [*frames, None]:
        try:
            nodes[0].push(frame)
            while True:
                out.append(nodes[-1].pull())
        except (av.BlockingIOError, av.EOFError):
            pass
    return out


def numbered(stamps: list[int], end: int, tick: Fraction) -> list[av.VideoFrame]:
    """Small frames that show their number."""
    frames = []
    for number, stamp in enumerate(stamps):
        frame = av.VideoFrame.from_ndarray(np.full((16, 16), number, np.uint8), format="gray")
        frame.pts, frame.time_base = stamp, tick
        frame.duration = ([*stamps, end])[number + 1] - stamp
        frames.append(frame)
    return frames


def original(fps: float, start: float | None = None, end: float | None = None) -> FrameRule:
    return FrameRule(fps, 1, 10_000, start, end, "original")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=60),
    st.sampled_from([Fraction(1, 1000), Fraction(1, 600), Fraction(1001, 30000)]),
    st.sampled_from(["1", "2", "0.5", "3.7"]),
)
def test_frames_at_any_times_equal_the_filters(gaps, tick, fps):
    stamps = [sum(gaps[:number]) for number in range(len(gaps))]
    shown = through_the_filter(numbered(stamps, sum(gaps), tick), tick, fps=fps)
    choice = choose_frames(Timeline(tuple(stamps), sum(gaps), tick), original(float(fps)))
    if shown:
        assert list(choice.picked) == [int(frame.to_ndarray()[0, 0]) for frame in shown]
        assert choice.times == pytest.approx([number / float(fps) for number in range(len(shown))])
    else:
        assert choice.picked == ((len(stamps) - 1) // 2,)


@pytest.mark.parametrize(("start", "end"), [(1.0, 3.0), (0.5, 2.9), (2.04, 3.52)])
def test_a_part_equals_the_filters_behind_trim(start, end):
    """ffmpeg's -ss and -t are the filter trim; its clock is 0 at START."""
    tick = Fraction(1, 25)
    stamps = [number - round(start * 25) for number in range(100)]
    trim = ("trim", f"start=0:duration={end - start}")
    shown = through_the_filter(numbered(stamps, stamps[-1] + 1, tick), tick, trim)
    choice = choose_frames(Timeline(tuple(range(100)), 100, tick), original(1.0, start, end))
    assert list(choice.picked) == [int(frame.to_ndarray()[0, 0]) for frame in shown]
    assert choice.times == pytest.approx([start + number for number in range(len(shown))])


def test_the_frames_of_the_paper_rate():
    choice = choose_frames(Timeline(tuple(range(85)), 85, Fraction(1, 25), Fraction(25)), original(1.0))
    assert (choice.picked, choice.times) == ((24, 49, 74), (0.0, 1.0, 2.0))


def test_too_many_frames_are_thinned_as_by_the_original():
    timeline = Timeline(tuple(range(1000)), 1000, Fraction(1, 10))
    choice = choose_frames(timeline, FrameRule(1.0, 1, 7, frame_sampling="original"))
    seconds = np.linspace(0, 99, 7, dtype=int)
    assert choice.times == tuple(seconds)
    assert choice.picked == tuple(10 * seconds + 9)


def test_a_part_of_under_a_second_is_read_by_number():
    """load_video_from_ids: frames int(START * 25) - 1 to int(END * 25) - 1, from the middle of the first step on."""
    timeline = Timeline(tuple(range(100)), 100, Fraction(1, 25))
    choice = choose_frames(timeline, original(1.0, 1.0, 1.6))
    assert (choice.picked, choice.times) == ((24 + 16 // 2,), (32 / 25,))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_real_clip_equals_the_filter(encode_clip, suffix):
    data = encode_clip(still_and_moving(85, 48, 64), rate=25, suffix=suffix, options={"bf": "0"})
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        shown = through_the_filter(list(container.decode(stream)), stream.time_base)
    clip = decode_clip(data, fps=1.0, min_frames=1, max_frames=180, limits=LIMITS, frame_sampling="original")
    np.testing.assert_array_equal(
        clip.frames, np.stack([frame.to_ndarray(format="rgb24") for frame in shown])
    )
    assert clip.times == (0.0, 1.0, 2.0)
