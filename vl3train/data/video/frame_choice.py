"""Which frames of a clip are taken, and what time each is said to have. Pure: stamps in, frame numbers out.

A frame stays until the next one comes, the last one until the end of the clip. So a picture that stays may be taken
several times. docs/frame_sampling.md compares the two rules of ``data.frame_sampling``.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from itertools import pairwise

from vl3train.contracts.geometry import frame_indices
from vl3train.contracts.records import SampleError
from vl3train.data.video.original_sampling import choose_as_the_original
from vl3train.data.video.timeline import FrameChoice, FrameRule, Timeline

SLOWEST_VIDEO = 1
"""Frames a second. A picture that stays for longer is a still: it is taken again while it stays."""
ROUNDING = 0.001
"""Seconds. Matroska and others write stamps in milliseconds."""


def choose_frames(timeline: Timeline, rule: FrameRule) -> FrameChoice:
    """The frames that the rule takes of a clip.

    Raises:
        SampleError: the clip ends before the rule's start.

    >>> from fractions import Fraction
    >>> slides = Timeline(stamps=(0, 5000, 10000), end=15000, tick=Fraction(1, 1000))
    >>> choose_frames(slides, FrameRule(fps=0.4, min_frames=1, max_frames=180)).picked
    (0, 0, 1, 1, 2, 2)
    """
    times = timeline.times()
    if (rule.start_seconds or 0.0) > max(timeline.seconds, times[-1] + 1.0):
        raise SampleError(
            f"start_time={rule.start_seconds} lies behind the clip's end, {timeline.seconds:.2f} s; correct it"
        )
    if rule.frame_sampling == "original":
        return choose_as_the_original(timeline, rule)
    rate = timeline.constant_rate()
    if rate is None or rate < SLOWEST_VIDEO:
        return _by_clock(timeline, times, rule)
    window = _window(times, rule)
    limits = {"fps": rule.fps, "min_frames": rule.min_frames, "max_frames": rule.max_frames}
    chosen = frame_indices(window[1] - window[0], float(rate), **limits)  # type: ignore[arg-type]
    picked = tuple(window[0] + index for index in chosen)
    return FrameChoice(picked, tuple(times[number] for number in picked), window)


def _by_clock(timeline: Timeline, times: list[float], rule: FrameRule) -> FrameChoice:
    """What is on the screen at equal distances of time; all that is to see where more is asked for than there is."""
    slack = min(float(timeline.tick), ROUNDING)
    first = min(max(rule.start_seconds or 0.0, 0.0), timeline.seconds)
    last = timeline.seconds if rule.end_seconds is None else min(rule.end_seconds, timeline.seconds)
    seconds = max(last - first, 0.0)
    begin = max(bisect_right(times, first + slack) - 1, 0)
    window = (begin, max(bisect_left(times, last - slack), begin + 1))
    fewest = min(rule.min_frames, window[1] - window[0])
    count = max(math.floor(min(max((seconds + slack) * rule.fps, fewest), rule.max_frames)), 1)
    bounds = [first, *times[window[0] + 1 : window[1]], last]
    every = [
        (number, begins + repeat / rule.fps)
        for number, (begins, ends) in enumerate(pairwise(bounds), window[0])
        for repeat in range(_times_to_see(ends - begins, rule.fps, slack))
    ]
    if 0 < len(every) <= count:
        return FrameChoice(tuple(one for one, _ in every), tuple(time for _, time in every), window)
    shown = [first + number * seconds / count for number in range(count)]
    picked = tuple(min(max(bisect_right(times, at + slack) - 1, begin), window[1] - 1) for at in shown)
    return FrameChoice(picked, tuple(shown), window)


def _times_to_see(stays: float, fps: float, slack: float) -> int:
    """How often a picture can be taken: once, if it stays for over a second as often as asked, never without time."""
    if stays > 1 / SLOWEST_VIDEO + slack:
        return max(int((stays + slack) * fps), 1)
    return int(stays > 0)


def _window(times: list[float], rule: FrameRule) -> tuple[int, int]:
    """Numbers of the frames with ``start <= time < end``; of a gap between two frames, the one before it."""
    first = 0 if rule.start_seconds is None else bisect_left(times, rule.start_seconds - 1e-6)
    last = len(times) if rule.end_seconds is None else bisect_left(times, rule.end_seconds - 1e-6)
    if first >= last:
        first = min(max(first - 1, 0), len(times) - 1)
        last = first + 1
    return first, last
