"""The frames that the original code takes of a clip (VideoLLaMA3, mm_utils.py: load_video), without running ffmpeg.

It runs ``ffmpeg -ss START -t SECONDS -i CLIP -vf fps=FPS:round=down``: the second number k shows the last frame that
begins before its end, k + 1. So of 25 frames a second it takes 24, 49, 74, and calls them 0.0, 1.0 and 2.0 s.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from fractions import Fraction

import numpy as np

from vl3train.data.video.timeline import FrameChoice, FrameRule, Timeline

LARGEST_TERM = 1_001_000
"""ffmpeg reads a rate as a fraction of numbers up to this (libavutil/parseutils.c: av_parse_video_rate)."""


def choose_as_the_original(timeline: Timeline, rule: FrameRule) -> FrameChoice:
    """The frames and times of the original code. ``min_frames`` has no part in it.

    Where ffmpeg gives no frame at all (a clip shorter than 1 / fps), the frame in the middle is taken, as its reader
    for parts of under a second does; the original fails there.
    """
    if rule.start_seconds is not None and rule.end_seconds is not None:
        earlier, later = sorted((max(rule.start_seconds, 0.0), max(rule.end_seconds, 0.0)))
        if later - earlier < 1:
            return _part_of_a_second(timeline, earlier, later if later > earlier else earlier + 1, rule)
    tick, fps = timeline.tick, Fraction(rule.fps).limit_denominator(LARGEST_TERM)
    begins = timeline.stamps[0] * tick  # what ffprobe calls start_time
    start = begins if rule.start_seconds is None else max(begins, Fraction(rule.start_seconds))
    seconds = timeline.end * tick - start
    if rule.end_seconds is not None:
        seconds = min(seconds, Fraction(rule.end_seconds) - start)
    cut = rule.start_seconds is not None or rule.end_seconds is not None
    # ffmpeg's own clock is 0 where the file begins, or at START behind that.
    zero = timeline.origin + (round(start / tick) if cut else 0)
    first = bisect_left(timeline.stamps, zero) if cut else 0
    last = len(timeline.stamps)
    if cut and first < last:
        last = bisect_left(timeline.stamps, timeline.stamps[first] + seconds / tick)
    if first >= last:
        number = min(max(first - 1, 0), len(timeline.stamps) - 1)
        return FrameChoice((number,), (float(start),), (number, number + 1))
    end = timeline.stamps[last] if last < len(timeline.stamps) else timeline.end
    slots = [int((stamp - zero) * tick * fps // 1) for stamp in timeline.stamps[first:last]]
    times = np.arange(float(start), float(start + seconds) + 1 / rule.fps, 1 / rule.fps)
    count = min(int((end - zero) * tick * fps // 1), len(times))
    if count < 1:
        middle = (first + last - 1) // 2
        return FrameChoice((middle,), (float(start),), (first, last))
    picked = [first + max(bisect_right(slots, slot) - 1, 0) for slot in range(count)]
    kept = list(range(count))
    if count > rule.max_frames:
        kept = np.linspace(0, count - 1, rule.max_frames, dtype=int).tolist()
    return FrameChoice(
        tuple(picked[slot] for slot in kept), tuple(float(times[slot]) for slot in kept), (first, last)
    )


def _part_of_a_second(timeline: Timeline, start: float, end: float, rule: FrameRule) -> FrameChoice:
    """The rule of load_video_from_ids, which reads by frame number at the average rate (decord)."""
    count = len(timeline.stamps)
    rate = count / timeline.seconds if timeline.seconds else 1.0
    first = min(max(int(start * rate) - 1, 0), count - 1)
    last = max(min(int(end * rate) - 1, count - 1), first)
    duration = last - first + 1
    if duration / rate < rule.max_frames:
        step = max(int(min(rate // rule.fps, duration)), 1)
        numbers = list(range(first + step // 2, last + 1, step))
    else:
        numbers = [
            first + int(index) for index in np.linspace(0, duration - 1, min(rule.max_frames, duration))
        ]
    return FrameChoice(tuple(numbers), tuple(number / rate for number in numbers), (first, last + 1))
