"""When each frame of an opened clip is shown, from its packets where those can be trusted, else by decoding.

Frames are counted by reading packets, which costs next to nothing, for codecs where that is sound.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vl3train.contracts.records import SampleError
from vl3train.data.video.mended_stamps import mended_stamps
from vl3train.data.video.opening import TITLES, WAY_OUT, frames_of, from_library, packets_of
from vl3train.data.video.timeline import Timeline
from vl3train.data.video.whole_files import avi_chunks, matroska_is_whole

ONE_PACKET_ONE_FRAME = {"h264", "hevc", "libdav1d", "av1", "mjpeg"}
"""Codecs whose frames can be counted undecoded; VP8 and packed MPEG-4 have packets that show nothing."""
STILL_SECONDS = 0.5
"""A file that announces no more than this behind its last frame is whole: sound often ends a little later."""


@dataclass(frozen=True, slots=True)
class FileTimes:
    """When frames are shown, and whether a frame is found again by its stamp."""

    timeline: Timeline
    by_stamp: bool  # else only by counting from the beginning: stamps are missing, equal or made up


@dataclass(frozen=True, slots=True)
class _Shown:
    """What a packet or a frame says of its time, in ticks; None where it says nothing."""

    pts: int | None
    dts: int | None
    duration: int

    @classmethod
    def of(cls, carrier: Packet | VideoFrame) -> _Shown:
        return cls(carrier.pts, carrier.dts, carrier.duration or 0)


def fraction_of(ratio: Any) -> Fraction | None:
    """A rate or time base of PyAV as a Fraction; None where it is unset.

    Up to PyAV 18 it is a Fraction or None. From 19 on it is an AVRational, which rounds to 32 bits.
    """
    return Fraction(ratio.numerator, ratio.denominator) if ratio else None


def read_times(data: bytes, container: InputContainer, stream: VideoStream, exact: bool) -> FileTimes:
    """Read the file to its end.

    Raises:
        SampleError: it is cut off, has no frame, or says nothing about time.
    """
    with from_library("clip cannot be read"):
        kind, codec = container.format.name, stream.codec_context.name
        rate, tick = fraction_of(stream.average_rate or stream.guessed_rate), fraction_of(stream.time_base)
    by_packet = not exact and codec in ONE_PACKET_ONE_FRAME and _one_of(kind, "mp4", "matroska", "avi")
    shown: list[_Shown] = []
    num_packets = num_whole = 0
    for packet in packets_of(container, stream):
        if packet.size:
            num_packets += 1
            num_whole += not packet.is_corrupt
        if not by_packet:
            shown += [_Shown.of(frame) for frame in frames_of(packet)]
        elif packet.size and not packet.is_discard:
            shown.append(_Shown.of(packet))
    if not shown:
        raise SampleError(f"clip has no frame; {WAY_OUT}")
    if _one_of(kind, "mp4") and num_whole < stream.frames:
        _refuse_unless_edited(data, stream.frames, num_packets, num_whole)
    presented = None
    if tick is not None and not by_packet and not _one_of(kind, "avi"):
        mended = mended_stamps([one.pts for one in shown], tick, rate, kind)
        presented = mended and (mended, False)
    presented = presented or _in_order(shown, by_packet, _one_of(kind, "avi"))
    if tick is None or presented is None:
        if not rate:
            raise SampleError(
                "clip does not say when its frames are shown, nor its frame rate; encode it again with a rate"
            )
        return FileTimes(Timeline(tuple(range(len(shown))), len(shown), 1 / rate, rate), False)
    stamps, by_stamp = presented
    end = max(_end(shown, stamps, rate, tick), stamps[-1])
    origin = (
        round(container.start_time / av.time_base / tick) if container.start_time is not None else stamps[0]
    )
    said = Timeline(stamps, end, tick, rate, min(origin, stamps[0]))
    return FileTimes(_until_announced_end(data, container, stream, said), by_stamp)


def _one_of(kind: str, *names: str) -> bool:
    return any(name in kind for name in names)


def _in_order(shown: Sequence[_Shown], by_packet: bool, in_avi: bool) -> tuple[tuple[int, ...], bool] | None:
    """Stamps in order of presentation, and whether each names one frame; None where the file has none.

    AVI has no time of presentation: what the library calls so is a guess, wrong with B-frames. The times of its chunks
    in their order are right. Decoded frames come in order of presentation: stamps that fall are such guesses too.
    """
    pts = [one.pts for one in shown if one.pts is not None]
    if by_packet:
        pts.sort()
    if len(pts) == len(shown) and not (in_avi and by_packet):
        gaps = [later - earlier for earlier, later in pairwise(pts)]
        if min(gaps, default=1) >= 0:
            return tuple(pts), min(gaps, default=1) > 0
    dts = sorted({one.dts for one in shown if one.dts is not None})
    return (tuple(dts), False) if len(dts) == len(shown) else None


def _end(shown: Sequence[_Shown], stamps: tuple[int, ...], rate: Fraction | None, tick: Fraction) -> int:
    """Where the last frame ends by its own duration; where it says none, by the clip's rate or its last gap."""
    last = max((one.duration for one in shown if stamps[-1] in (one.pts, one.dts)), default=0)
    if last <= 0 and rate:
        last = round(1 / rate / tick)
    if last <= 0 and len(stamps) > 1:
        last = stamps[-1] - stamps[-2]
    return stamps[-1] + last


def _until_announced_end(
    data: bytes, container: InputContainer, stream: VideoStream, found: Timeline
) -> Timeline:
    """The last picture stays until the announced end, where the file is whole.

    MP4 says how long each frame lasts, and how many there are. Matroska and AVI are looked through. In other containers
    a file that is cut off cannot be told from one whose picture stays: the last frame has its own duration.

    Raises:
        SampleError: the file is cut off.
    """
    kind, tick = container.format.name, found.tick
    with from_library("clip cannot be read"):
        said, start, number = stream.frames, stream.start_time or 0, stream.index
        end = start + said
        if _one_of(kind, "matroska"):
            end = _announced_matroska_end(container, stream, found)
    if _one_of(kind, "avi") and end > found.end:
        chunks = avi_chunks(data, number)
        whole = chunks >= said - 1 - chunks // 20  # headers may be a little off
        found = replace(found, end=max(found.end, start + chunks)) if whole else found
    elif _one_of(kind, "matroska") and (end - found.end) * tick > STILL_SECONDS:
        whole = matroska_is_whole(data)
        found = replace(found, end=end) if whole else found
    else:
        return found
    if not whole:
        announced = float((end - found.stamps[0]) * tick)
        raise SampleError(
            f"clip is cut off: {announced:.1f} s announced, {found.seconds:.1f} s are there; get the whole file"
        )
    return found


def _announced_matroska_end(container: InputContainer, stream: VideoStream, found: Timeline) -> int:
    """By the track's tag; else by the file's duration, which a longer sound track may have set."""
    hours, _, rest = stream.metadata.get("DURATION", "").partition(":")
    minutes, _, seconds = rest.partition(":")
    try:
        ends = 3600 * Fraction(hours) + 60 * Fraction(minutes) + Fraction(seconds)
    except ValueError:
        ends = Fraction((container.start_time or 0) + (container.duration or 0), av.time_base)
        if len(container.streams) > 1 and found.constant_rate():
            return found.end
    return int(ends / found.tick)


def _refuse_unless_edited(data: bytes, said: int, packets: int, whole: int) -> None:
    """An edit list may leave frames out that the file has: then it is whole.

    Raises:
        SampleError: the file is cut off.
    """
    if packets == whole:
        with (
            from_library("clip cannot be read"),
            av.open(io.BytesIO(data), "r", options={"ignore_editlist": "1"}, **TITLES) as container,
        ):
            most = max(container.streams.video, key=lambda stream: stream.frames)
            there = [packet for packet in container.demux(most) if packet.size]
            if len(there) >= said and not any(packet.is_corrupt for packet in there):
                return
    raise SampleError(f"clip is cut off: {said} frames said, {whole} are there; get the whole file")
