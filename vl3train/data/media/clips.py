"""Clips from bytes: sizes from the header first, then pixels. Whatever is wrong raises SampleError.

What is read may come from anywhere. So the containers are named (no playlist), the header is checked against the
limits before anything is decoded, and a damaged file is rejected as a whole. Images: data/pictures/images.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import cast

import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vl3train.contracts.records import SampleError
from vl3train.data.video.frame_choice import choose_frames
from vl3train.data.video.frame_times import read_times
from vl3train.data.video.opening import (
    WAY_OUT,
    DecodeLimits,
    frames_of,
    from_library,
    opened_clip,
    packets_of,
    refuse_too_long,
    seek_keyframe,
)
from vl3train.data.video.orientation import Upright
from vl3train.data.video.timeline import FrameRule


class FrameCountError(SampleError):
    """Other frames were decoded than the packets announced; count them by decoding (``exact=True``)."""


@dataclass(frozen=True)
class Clip:
    """Frames taken from a clip."""

    frames: np.ndarray  # (t, h, w, 3) uint8 RGB
    times: tuple[float, ...]  # (t,) seconds since the file's first frame


@dataclass(frozen=True)
class ClipPlan:
    """Which frames of a file are taken; known before they are decoded."""

    height: int
    width: int
    times: tuple[float, ...]  # (t,) seconds since the file's first frame
    picked: tuple[
        int, ...
    ]  # (t,) frame numbers in order of presentation; a picture that stays is there again
    window: tuple[int, int]  # frame numbers from the first one inside start and end to behind the last
    pts: tuple[int, ...] | None  # of every frame; None where they do not name each frame


def decode_clip(
    data: bytes,
    *,
    fps: float,
    min_frames: int,
    max_frames: int,
    limits: DecodeLimits,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    frame_sampling: str = "transformers",
) -> Clip:
    """The sampled frames of a clip. ``times`` count from the file's first frame, also where ``start_seconds``
    cuts the beginning off (as the original code prints them; only stream turns subtract the start)."""
    rule = FrameRule(fps, min_frames, max_frames, start_seconds, end_seconds, frame_sampling)
    plan = plan_clip(data, rule, limits)
    try:
        frames = list(read_frames(data, plan))
    except FrameCountError:
        plan = plan_clip(data, rule, limits, exact=True)
        frames = list(read_frames(data, plan))
    return Clip(np.stack(frames), plan.times)


def plan_clip(data: bytes, rule: FrameRule, limits: DecodeLimits, *, exact: bool = False) -> ClipPlan:
    """Which frames are taken, by ``video.frame_choice`` between start and end.

    Frames are counted by reading packets, for codecs where that is sound; else, and with ``exact``, by decoding.
    """
    with opened_clip(data, limits) as (container, stream):
        first = next(_all_frames(container, stream), None)
        if first is None:
            raise SampleError(f"clip has no frame; {WAY_OUT}")
        upright = Upright()(first)
        file_times = read_times(data, container, stream, exact) if seek_keyframe(container) else None
    if file_times is None:  # opened anew, which takes as long as decoding two frames
        with opened_clip(data, limits) as (container, stream):
            file_times = read_times(data, container, stream, exact)
    timeline = file_times.timeline
    refuse_too_long(timeline.times()[-1], limits)
    choice = choose_frames(timeline, rule)
    stamps = timeline.stamps if file_times.by_stamp else None
    return ClipPlan(upright.height, upright.width, choice.times, choice.picked, choice.window, stamps)


def read_frames(data: bytes, plan: ClipPlan) -> Iterator[np.ndarray]:
    """The planned frames one after the other, each (height, width, 3) uint8 RGB, the whole window decoded.

    Raises:
        FrameCountError: the frames are not those that the plan counted.
    """
    number_of = None if plan.pts is None else {stamp: number for number, stamp in enumerate(plan.pts)}
    wanted, number, turn = Counter(plan.picked), -1, Upright()
    with closing(_frames_from(data, plan, number_of)) as frames:
        for frame in frames:
            before = number
            number = before + 1 if number_of is None else number_of.get(cast(int, frame.pts), -1)
            if number < 0 or (before >= plan.window[0] and number != before + 1):
                raise FrameCountError(
                    f"clip is damaged: after frame {before} comes frame {number}; {WAY_OUT}"
                )
            if number >= plan.window[1]:
                break
            if number not in wanted:
                continue
            upright = turn(frame)
            with from_library("clip cannot be decoded"):
                picture: np.ndarray = upright.to_ndarray(format="rgb24")
            if picture.shape != (plan.height, plan.width, 3):
                raise SampleError(
                    f"clip changes its size at frame {number} to {picture.shape[1::-1]}; cut it there"
                )
            for _ in range(wanted.pop(number)):
                yield picture
    if wanted or number + 1 < plan.window[1]:
        raise FrameCountError(f"clip ends at frame {number}, {plan.window[1]} were counted; {WAY_OUT}")


def _frames_from(
    data: bytes, plan: ClipPlan, number_of: dict[int, int] | None
) -> Generator[VideoFrame, None, None]:
    """Frames in order of presentation, from a keyframe before the window where one is found, else from the first."""
    limits, first = DecodeLimits(plan.height * plan.width, float("inf")), plan.window[0]
    if plan.pts is not None and number_of is not None and first > 0:
        with opened_clip(data, limits) as (container, stream):
            if seek_keyframe(container, stream, plan.pts[first]):
                found = _all_frames(container, stream)
                frame = next(found, None)
                if frame is not None and number_of.get(cast(int, frame.pts), first + 1) <= first:
                    yield frame
                    yield from found
                    return
    with opened_clip(data, limits) as (container, stream):
        yield from _all_frames(container, stream)


def _all_frames(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    return chain.from_iterable(frames_of(packet) for packet in packets_of(container, stream))
