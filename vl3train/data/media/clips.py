"""Clips from bytes: sizes from the header first, then pixels. Whatever is wrong raises SampleError.

What is read may come from anywhere. So the containers are named (no playlist), the header is checked against the
limits before anything is decoded, and a damaged file is rejected as a whole. Images: images.py.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from vl3train.contracts.geometry import frame_indices
from vl3train.contracts.records import SampleError

CLIP_FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,mpegvideo"
"""No format that opens other files or addresses (hls, concat, dash)."""

ONE_PACKET_ONE_FRAME = {"h264", "hevc", "libdav1d", "av1", "mjpeg"}
"""Codecs whose frames can be counted undecoded; VP8 and packed MPEG-4 have packets that show nothing."""


@dataclass(frozen=True)
class DecodeLimits:
    """Limits on what a file's header says; a file beyond them is rejected."""

    max_pixels: int
    max_seconds: float


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
    picked: tuple[int, ...]  # (t,) frame numbers in order of presentation
    window: tuple[int, int]  # frame numbers from the first one inside start and end to behind the last
    pts: tuple[int, ...] | None  # of every frame; None where the file's own are missing or disordered


def decode_clip(
    data: bytes,
    *,
    fps: float,
    min_frames: int,
    max_frames: int,
    limits: DecodeLimits,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
) -> Clip:
    """The sampled frames of a clip. ``times`` count from the file's first frame, also where ``start_seconds``
    cuts the beginning off (as the original code prints them; only stream turns subtract the start)."""
    rule = {"fps": fps, "min_frames": min_frames, "max_frames": max_frames}
    window = {"start_seconds": start_seconds, "end_seconds": end_seconds}
    plan = plan_clip(data, **rule, **window, limits=limits)  # type: ignore[arg-type]
    try:
        frames = list(read_frames(data, plan))
    except FrameCountError:
        plan = plan_clip(data, **rule, **window, limits=limits, exact=True)  # type: ignore[arg-type]
        frames = list(read_frames(data, plan))
    return Clip(np.stack(frames), plan.times)


def plan_clip(
    data: bytes,
    *,
    fps: float,
    min_frames: int,
    max_frames: int,
    limits: DecodeLimits,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    exact: bool = False,
) -> ClipPlan:
    """Which frames are taken, by the rule of ``contracts.geometry.frame_indices`` between start and end.

    Frames are counted by reading packets, which costs next to nothing, for codecs where that is sound; else,
    and with ``exact``, by decoding. Times are the file's own, so a variable frame rate is no special case.
    """
    with _opened_clip(data, limits) as (container, stream):
        in_mp4 = "mp4" in container.format.name
        first = next(container.decode(stream), None)
        if first is None:
            raise SampleError("clip has no frame")
        container.seek(0)
        by_packet = (
            not exact
            and stream.codec_context.name in ONE_PACKET_ONE_FRAME
            and (in_mp4 or "matroska" in container.format.name)
        )
        if by_packet:
            packets = [packet for packet in container.demux(stream) if packet.size]
            missing = stream.frames - len(packets) + sum(packet.is_corrupt for packet in packets)
            stamps = [packet.pts for packet in packets if not packet.is_discard]
            stamps.sort(key=lambda stamp: -1 if stamp is None else stamp)
        else:
            stamps = [frame.pts for frame in container.decode(stream)]
            missing = stream.frames - len(stamps) - 1 - len(stamps) // 20  # AVI headers may be a little off
        if missing > 0:
            said = stream.frames or "more"
            raise SampleError(f"clip is cut off: {said} frames said, {len(stamps)} are there")
        source_fps = float(stream.average_rate or stream.guessed_rate or 0)
        if not stamps or source_fps <= 0:
            raise SampleError("clip has no frame, or does not say its frame rate")
        pts = _ordered(stamps)
        if pts is None:
            times = [number / source_fps for number in range(len(stamps))]
        else:
            assert stream.time_base is not None
            times = [float((stamp - pts[0]) * stream.time_base) for stamp in pts]
        sideways = first.rotation % 180 != 0
        height, width = (first.width, first.height) if sideways else (first.height, first.width)
        announced = _announced_seconds(stream)
    if announced > times[-1] + 2 / source_fps + 0.5:
        raise SampleError(f"clip is cut off: {announced:.1f} s announced, {times[-1]:.1f} s are there")
    if times[-1] > limits.max_seconds:
        raise SampleError(_too_long(times[-1], limits))
    window = _window(times, start_seconds, end_seconds)
    chosen = frame_indices(
        window[1] - window[0], source_fps, fps=fps, min_frames=min_frames, max_frames=max_frames
    )
    picked = tuple(window[0] + index for index in chosen)
    return ClipPlan(height, width, tuple(times[number] for number in picked), picked, window, pts)


def read_frames(data: bytes, plan: ClipPlan) -> Iterator[np.ndarray]:
    """The planned frames one after the other, each (height, width, 3) uint8 RGB, the whole window decoded.

    Raises:
        FrameCountError: the frames are not those that the plan counted.
    """
    number_of = None if plan.pts is None else {stamp: number for number, stamp in enumerate(plan.pts)}
    wanted, number = set(plan.picked), -1
    with _opened_clip(data, DecodeLimits(plan.height * plan.width, float("inf"))) as (container, stream):
        if plan.pts is not None and plan.window[0] > 0:
            container.seek(plan.pts[plan.window[0]], stream=stream)  # to the keyframe before
        for frame in container.decode(stream):
            before = number
            number = before + 1 if number_of is None else number_of.get(cast(int, frame.pts), -1)
            if number < 0 or (before >= plan.window[0] and number != before + 1):
                raise FrameCountError(f"clip is damaged: after frame {before} comes frame {number}")
            if number >= plan.window[1]:
                break
            if number not in wanted:
                continue
            picture: np.ndarray = frame.to_ndarray(format="rgb24")
            if frame.rotation:
                picture = np.ascontiguousarray(np.rot90(picture, frame.rotation // 90))
            if picture.shape != (plan.height, plan.width, 3):
                raise SampleError(f"clip changes its size at frame {number} to {picture.shape[1::-1]}")
            wanted.discard(number)
            yield picture
    if wanted or number + 1 < plan.window[1]:
        raise FrameCountError(f"clip ends at frame {number}, {plan.window[1]} were counted")


@contextmanager
def _opened_clip(data: bytes, limits: DecodeLimits) -> Iterator[tuple[InputContainer, VideoStream]]:
    try:
        with av.open(io.BytesIO(data), "r", options={"format_whitelist": CLIP_FORMATS}) as container:
            if not container.streams.video:
                raise SampleError("clip has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "NONE"  # one decoding process for each core is faster than threads in each
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > limits.max_pixels:
                limit = f"data.decode_max_pixels={limits.max_pixels}; shrink it or raise the limit"
                raise SampleError(f"clip of {width}x{height} pixels is over {limit}")
            if container.duration and container.duration / av.time_base > limits.max_seconds:
                raise SampleError(_too_long(container.duration / av.time_base, limits))
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise SampleError(f"clip of {len(data)} bytes cannot be read: {error.strerror or error}") from error


def _too_long(seconds: float, limits: DecodeLimits) -> str:
    limit = f"data.decode_max_seconds={limits.max_seconds}"
    return f"clip of {seconds:.1f} s is over {limit}; cut it or raise the limit"


def _announced_seconds(stream: VideoStream) -> float:
    """Length of the track by Matroska's tag, as that container gives no number of frames; 0 without it."""
    hours, _, rest = stream.metadata.get("DURATION", "").partition(":")
    minutes, _, seconds = rest.partition(":")
    try:
        return 3600 * float(hours) + 60 * float(minutes) + float(seconds)
    except ValueError:
        return 0.0


def _ordered(stamps: list[int | None]) -> tuple[int, ...] | None:
    known = tuple(stamp for stamp in stamps if stamp is not None)
    rising = all(earlier < later for earlier, later in pairwise(known))
    return known if rising and len(known) == len(stamps) else None


def _window(times: list[float], start: float | None, end: float | None) -> tuple[int, int]:
    """Numbers of the frames with ``start <= time < end``; of a gap between two frames, the one before it."""
    first = int(np.searchsorted(times, -1.0 if start is None else start - 1e-6))
    last = len(times) if end is None else int(np.searchsorted(times, end - 1e-6))
    if first >= len(times) and (start or 0.0) > times[-1] + 1.0:
        raise SampleError(f"start_time={start} lies behind the clip's end, {times[-1]:.2f} s")
    if first >= last:
        first = min(max(first - 1, 0), len(times) - 1)
        last = first + 1
    return first, last
