"""A clip's container, opened: named formats only, limits before anything is decoded, the stream that people watch.

Whatever leaves PyAV is a SampleError with its reason: its list of error classes grows with each damaged file that
somebody finds. So each call into it is wrapped (``from_library``), and an error of our own code still crashes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from vl3train.contracts.records import SampleError

CLIP_FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,mpegvideo"
"""No format that opens other files or addresses (hls, concat, dash)."""

KEYFRAME_LISTS = ("mp4", "matroska", "avi")
"""Formats whose files say where keyframes lie."""

# Titles in Latin-1 are common. PyAV 18 has the argument; a later one reads such names without it.
TITLES: dict[str, Any] = (
    {"metadata_errors": "replace"} if "metadata_errors" in (av.open.__doc__ or "") else {}
)


WAY_OUT = "fetch it again, or encode it again if a player shows it"
"""Of a file that FFmpeg cannot read."""


@dataclass(frozen=True)
class DecodeLimits:
    """Limits on what a file's header says; a file beyond them is rejected."""

    max_pixels: int
    max_seconds: float


@contextmanager
def from_library(what: str) -> Iterator[None]:
    """Around calls into PyAV and nothing else: what they raise is the file's fault."""
    try:
        yield
    except SampleError:
        raise
    except Exception as error:
        raise SampleError(
            f"{what}: {getattr(error, 'strerror', None) or error or type(error).__name__}; {WAY_OUT}"
        ) from error


@contextmanager
def opened_clip(data: bytes, limits: DecodeLimits) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video.

    Raises:
        SampleError: it cannot be read, has no video, or is over the limits.
    """
    reading = f"clip of {len(data)} bytes cannot be read"
    container = _opened(data, reading)
    try:
        with from_library(reading):
            index, moved = _watched(container)
        if moved:  # not every format can be sought to its first frame
            container.close()
            container = _opened(data, reading)
        with from_library(reading):
            stream = cast(VideoStream, container.streams[index])
            codec = stream.codec_context
        if codec is None:
            raise SampleError(
                f"{reading}: this build of FFmpeg does not know the codec of its video{_tag(data)}; encode it as H.264"
            )
        with from_library(reading):
            stream.thread_type = "NONE"  # one decoding process for each core is faster than threads in each
            width, height = codec.width, codec.height
            seconds = (container.duration or 0) / av.time_base
        if width * height > limits.max_pixels:
            limit = f"data.decode_max_pixels={limits.max_pixels}; shrink it or raise the limit"
            raise SampleError(f"clip of {width}x{height} pixels is over {limit}")
        refuse_too_long(seconds, limits)
        yield container, stream
    finally:
        with from_library(reading):
            container.close()


def _opened(data: bytes, reading: str) -> InputContainer:
    with from_library(reading):
        return av.open(io.BytesIO(data), "r", options={"format_whitelist": CLIP_FORMATS}, **TITLES)


def refuse_too_long(seconds: float, limits: DecodeLimits) -> None:
    """Raises SampleError where a clip is longer than the limit."""
    if seconds > limits.max_seconds:
        limit = f"data.decode_max_seconds={limits.max_seconds}"
        raise SampleError(f"clip of {seconds:.1f} s is over {limit}; cut it or raise the limit")


def packets_of(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """All packets of the stream from where the container stands; the last one is empty and flushes the decoder."""
    packets = container.demux(stream)
    while True:
        with from_library("clip cannot be read"):
            packet = next(packets, None)
        if packet is None:
            return
        yield packet


def frames_of(packet: Packet) -> list[VideoFrame]:
    """The frames that come out of the decoder when this packet goes in."""
    with from_library("clip cannot be decoded"):
        return cast(list[VideoFrame], packet.decode())


def seek_keyframe(
    container: InputContainer, stream: VideoStream | None = None, stamp: int | None = None
) -> bool:
    """Go to the keyframe before a stamp of the stream, or to the beginning; False where that cannot be trusted.

    Without a list of keyframes FFmpeg lands somewhere near: in MPEG-TS behind the stamp and on no keyframe, and not at
    the first frame of a clip whose clock begins before 0 or whose first frame has no stamp.
    """
    with from_library("clip cannot be read"):
        if not any(kind in container.format.name for kind in KEYFRAME_LISTS):
            return False
        if stamp is None:
            begins = container.start_time or 0
            stamp = begins - 10 * av.time_base if begins < 0 else 0
        container.seek(stamp, stream=stream)
        return True


def _watched(container: InputContainer) -> tuple[int, bool]:
    """Number of the first video that is more than one picture: a cover or a thumbnail may come before it.

    And whether packets were read to find it.
    """
    videos = [
        stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic
    ]
    if not videos:
        covers = " but a cover picture: it is a sound file" if container.streams.video else ""
        raise SampleError(f"clip has no video stream{covers}; leave it out")
    if len(videos) == 1:
        return videos[0].index, False
    known = [stream for stream in videos if stream.codec_context is not None] or videos
    counts = dict.fromkeys((stream.index for stream in known), 0)
    for packet in container.demux(known):
        counts[packet.stream.index] += packet.size > 0
        if counts[known[0].index] > 1:
            break
    return next((stream for stream in known if counts[stream.index] > 1), known[0]).index, True


def _tag(data: bytes) -> str:
    """The codec's four letters in an MP4 file: in stsd behind size, name, version, count, and the entry's size."""
    at = data.find(b"stsd")
    name = data[at + 16 : at + 20]
    return f", {name.decode()!r}" if at >= 0 and name.isascii() and len(name) == 4 else ""
