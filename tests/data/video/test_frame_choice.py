"""Frames by transformers' rule on any constant rate, by the clock on any other, and what the original code takes."""

from __future__ import annotations

from bisect import bisect_right
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import VideoLlama3VideoProcessor
from transformers.video_utils import VideoMetadata

from vl3train.contracts.records import SampleError
from vl3train.data.video.frame_choice import choose_frames
from vl3train.data.video.timeline import FrameRule, Timeline

ONE = FrameRule(fps=1.0, min_frames=1, max_frames=180)
RATES = st.sampled_from([Fraction(rate) for rate in (1, 5, 12, 24, 25, 30, 60)] + [Fraction(30000, 1001)])


PROCESSOR = VideoLlama3VideoProcessor()


def even(count: int, rate: Fraction, tick: Fraction, said: Fraction | None) -> Timeline:
    places = [round(number / rate / tick) for number in range(count + 1)]
    return Timeline(tuple(places[:-1]), places[-1], tick, said)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 9000),
    RATES,
    st.sampled_from(["1/1000", "1/90000", "1/30000"]),
    st.sampled_from([0.5, 1.0, 2.0, 24.0]),
)
def test_a_constant_rate_is_sampled_as_by_transformers(count, rate, tick, fps):
    """Also where the container rounds stamps to milliseconds, and never a frame behind the last."""
    metadata = VideoMetadata(total_num_frames=count, fps=float(rate))
    expected = PROCESSOR.sample_frames(metadata, fps=fps, min_frames=4, max_frames=180).tolist()
    if expected[-1] == count:
        expected.pop()
    timeline = even(count, rate, Fraction(tick), rate)
    choice = choose_frames(timeline, FrameRule(fps, 4, 180))
    assert list(choice.picked) == expected
    assert choice.times == tuple(timeline.times()[number] for number in expected)


@pytest.mark.parametrize("said", [None, Fraction(1000, 33), Fraction(25)])
def test_a_header_that_says_another_rate_changes_nothing(said):
    assert choose_frames(even(300, Fraction(10), Fraction(1, 1000), said), ONE).picked == tuple(
        range(0, 300, 10)
    )


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 9000), min_size=2, max_size=60),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.one_of(st.none(), st.floats(0, 20)),
    st.one_of(st.none(), st.floats(21, 90)),
)
def test_each_picture_is_what_is_on_the_screen_at_its_time(gaps, fps, start, end):
    stamps = [sum(gaps[:number]) for number in range(len(gaps))]
    timeline = Timeline(tuple(stamps), sum(gaps), Fraction(1, 1000))
    if timeline.constant_rate() or timeline.seconds <= (start or 0):
        return
    choice = choose_frames(timeline, FrameRule(fps, 1, 500, start, end))
    length = min(end or 1e9, timeline.seconds) - (start or 0)
    wanted = max(int((length + 0.001) * fps), 1)
    on_screen = tuple(bisect_right(timeline.times(), time + 0.001) - 1 for time in choice.times)
    if len(choice.picked) < wanted or choice.picked != on_screen:  # asked for all there is, or for more
        assert len(choice.picked) <= wanted
        assert set(choice.picked) == set(range(*choice.window))
    assert choice.times[0] == pytest.approx(start or 0)
    assert choice.window[0] <= choice.picked[0] <= choice.picked[-1] < choice.window[1]


@pytest.mark.parametrize(
    ("stamps", "end", "picked"),
    [
        ((0, 5000, 10000), 15000, (0,) * 5 + (1,) * 5 + (2,) * 5),
        ((0, 5000, 10000, 15000), 15040, (0,) * 5 + (1,) * 5 + (2,) * 5),
        ((0,), 10000, (0,) * 10),
        ((0,), 40, (0,)),
        ((7000,), 7000, (0,)),  # no duration at all
        ((0, 0, 0, 3000), 4000, (2, 2, 2, 3)),  # of frames at the same time the last one is seen
        ((0, 100, 200, 2000), 2100, (0, 2)),
    ],
)
def test_a_frame_stays_until_the_next_one_comes(stamps, end, picked):
    assert choose_frames(Timeline(stamps, end, Fraction(1, 1000), Fraction(25)), ONE).picked == picked


def test_fewest_and_most_frames():
    stills = Timeline((0, 100, 700), 900, Fraction(1, 1000))
    assert choose_frames(stills, FrameRule(1.0, 4, 180)).picked == (0, 1, 2)  # min_frames repeats no picture
    assert choose_frames(Timeline((0, 100), 10_000, Fraction(1, 1000)), FrameRule(1.0, 1, 4)).times == (
        0,
        2.5,
        5,
        7.5,
    )


def test_more_frames_than_there_are_gives_all_of_them_at_their_times():
    stamps = (0, 1, 2, 3, 10, 20, 30, 40)
    assert choose_frames(
        Timeline(stamps, 41, Fraction(1, 10)), FrameRule(100.0, 1, 180)
    ).times == pytest.approx([stamp / 10 for stamp in stamps])
    slides = Timeline((0, 5000, 10_000), 15_000, Fraction(1, 1000))
    assert choose_frames(slides, FrameRule(2.0, 1, 180)).picked == (0,) * 10 + (1,) * 10 + (2,) * 10


def test_start_behind_the_end_is_refused():
    slides = Timeline((0, 5000), 10_000, Fraction(1, 1000))
    assert choose_frames(slides, FrameRule(1.0, 1, 180, 9.5)).picked == (1,)
    with pytest.raises(SampleError, match=r"start_time=10\.5 lies behind"):
        choose_frames(slides, FrameRule(1.0, 1, 180, 10.5))
