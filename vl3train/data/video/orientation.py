"""Frames stand as a player shows them: the whole display matrix is applied, by the filters that ffmpeg inserts.

A phone writes how it was held, and whether the front camera's picture is mirrored, as a matrix (ISO 14496-12, 8.3.2).
The steps are those of ffmpeg's ``-autorotate`` (fftools/ffmpeg_filter.c: configure_input_video_filter), in the clip's
own pixel format as there, so that pixels are the same.
"""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from typing import cast

from av.filter import Graph
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame

from vl3train.data.video.opening import from_library

Filter = tuple[str, str]
"""Name and arguments."""


def upright_filters(matrix: tuple[int, ...]) -> list[Filter]:
    """The filters that ffmpeg inserts for a display matrix of nine numbers.

    >>> upright_filters((0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30))
    [('transpose', 'clock')]
    """
    angle = _clockwise_degrees(matrix)
    if abs(angle - 90) < 1:
        return [("transpose", "cclock_flip" if matrix[3] > 0 else "clock")]
    if abs(angle - 180) < 1:
        return [("hflip", "")] * (matrix[0] < 0) + [("vflip", "")] * (matrix[4] < 0)
    if abs(angle - 270) < 1:
        return [("transpose", "clock_flip" if matrix[3] < 0 else "cclock")]
    if abs(angle) > 1:
        return [("rotate", f"{angle:f}*PI/180")]
    return [("vflip", "")] * (matrix[4] < 0)


class Upright:
    """Turns the frames of one clip. It keeps the filters from frame to frame."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._graph: Graph | None = None

    def __call__(self, frame: VideoFrame) -> VideoFrame:
        """The frame as it is shown; itself where it has no matrix.

        Raises:
            SampleError: it cannot be turned.
        """
        with from_library("clip cannot be turned upright"):
            filters = upright_filters(_matrix(frame))
            if not filters:
                return frame
            key = (
                tuple(filters),
                frame.width,
                frame.height,
                frame.format.name,
                frame.colorspace,
                frame.color_range,
            )
            if key != self._key:
                self._key, self._graph = key, _graph(frame, filters)
            assert self._graph is not None
            self._graph.push(frame)
            return cast(VideoFrame, self._graph.pull())


def _matrix(frame: VideoFrame) -> tuple[int, ...]:
    data = frame.side_data.get(cast(str, Type.DISPLAYMATRIX))  # the stubs say that keys are words
    if data is not None:
        return struct.unpack("=9i", bytes(cast(bytes, data))[:36])
    return (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)


def _clockwise_degrees(matrix: tuple[int, ...]) -> float:
    """``get_rotation`` of fftools/cmdutils.c over ``av_display_rotation_get``; 0 for a matrix that has no angle."""
    across, down = math.hypot(matrix[0], matrix[3]), math.hypot(matrix[1], matrix[4])
    if not across or not down:
        return 0.0
    angle = float(round(math.degrees(math.atan2(matrix[1] / down, matrix[0] / across))))
    return angle - 360 * math.floor(angle / 360 + 0.9 / 360)


def _graph(frame: VideoFrame, filters: list[Filter]) -> Graph:
    graph = Graph()
    base = frame.time_base or Fraction(1, 25)  # a graph needs one; nothing here depends on it
    source = graph.add(
        "buffer",
        video_size=f"{frame.width}x{frame.height}",
        pix_fmt=frame.format.name,
        time_base=f"{base.numerator}/{base.denominator}",
        colorspace=str(int(frame.colorspace)),
        range=str(int(frame.color_range)),
    )
    graph.link_nodes(source, *(graph.add(*one) for one in filters), graph.add("buffersink")).configure()
    return graph
