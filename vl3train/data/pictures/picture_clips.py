"""Clips that are pictures: GIF, animated WebP and PNG with their own delays, and lists of pictures with their times.

Each frame is the whole canvas as a viewer shows it, disposal and blending done; where it is transparent it is white,
as ffmpeg's GIF decoder and a browser's page make it. Pictures of a list are decoded like images.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from fractions import Fraction
from itertools import accumulate

import numpy as np
from PIL import Image

from vl3train.contracts.records import SampleError
from vl3train.data.media.clips import ClipPlan, DecodeLimits
from vl3train.data.media.picture_lists import is_picture_list, read_picture_list
from vl3train.data.pictures.colours import AS_TRANSFORMERS, Colours, to_rgb
from vl3train.data.pictures.delays import first_is_apart, frame_delays, is_moving
from vl3train.data.pictures.images import decode_image, image_header
from vl3train.data.pictures.library_errors import library_call
from vl3train.data.video.frame_choice import choose_frames
from vl3train.data.video.timeline import FrameRule, Timeline

TICKS = 1_000_000
"""A second of a list's times."""


def is_picture_clip(data: bytes) -> bool:
    """Whether a clip is one of these, by how it begins."""
    return is_moving(data) or is_picture_list(data)


def plan_pictures(data: bytes, rule: FrameRule, limits: DecodeLimits) -> ClipPlan:
    """Which pictures are taken, by ``video.frame_choice`` on the clip's own times.

    Times of a list count as they are given, also where the first is not 0; ``start`` and ``end`` are on that clock.

    Raises:
        SampleError: damaged or over the limits.
    """
    if is_picture_list(data):
        pictures = read_picture_list(data)
        header = image_header(pictures.pictures[0], limits)
        times, end = pictures.times, pictures.end
    else:
        header = image_header(data, limits)
        ends = list(accumulate(frame_delays(data)))
        times, end = (0.0, *ends[:-1]), ends[-1]
    first = times[0]
    if end - first > limits.max_seconds:
        limit = f"data.decode_max_seconds={limits.max_seconds}"
        raise SampleError(f"clip of {end - first:.1f} s is over {limit}; cut it or raise the limit")
    timeline = Timeline(
        stamps=tuple(round((second - first) * TICKS) for second in times),
        end=round((end - first) * TICKS),
        tick=Fraction(1, TICKS),
    )
    on_clock = dataclasses.replace(
        rule, start_seconds=_since(rule.start_seconds, first), end_seconds=_since(rule.end_seconds, first)
    )
    choice = choose_frames(timeline, on_clock)
    shown = tuple(first + second for second in choice.times)
    return ClipPlan(header.height, header.width, shown, choice.picked, choice.window, None)


def read_pictures(
    data: bytes, plan: ClipPlan, limits: DecodeLimits, colours: Colours = AS_TRANSFORMERS
) -> Iterator[np.ndarray]:
    """The planned frames one after the other, each (height, width, 3) uint8 RGB; a picture that stays comes again."""
    wanted = list(plan.picked)
    frames = _listed(data, plan, limits, colours) if is_picture_list(data) else _moving(data)
    for number, frame in frames:
        if frame.shape != (plan.height, plan.width, 3):
            of = f"{frame.shape[1]}x{frame.shape[0]} pixels, the first of {plan.width}x{plan.height}"
            raise SampleError(f"picture {number} of a clip is of {of}; make them one size")
        while wanted and wanted[0] == number:
            wanted.pop(0)
            yield frame
        if not wanted:
            return
    raise SampleError(f"clip ends before picture {wanted[0]}; it is damaged, fetch it again")


def _listed(
    data: bytes, plan: ClipPlan, limits: DecodeLimits, colours: Colours
) -> Iterator[tuple[int, np.ndarray]]:
    pictures = read_picture_list(data).pictures
    for number in sorted(set(plan.picked)):
        try:
            yield number, decode_image(pictures[number], limits, colours=colours)
        except SampleError as error:
            raise SampleError(f"picture {number} of a clip: {error}") from error


def _moving(data: bytes) -> Iterator[tuple[int, np.ndarray]]:
    what = f"moving picture of {len(data)} bytes"
    with library_call(what):
        image = Image.open(io.BytesIO(data), formats=("GIF", "WEBP", "PNG"))
    apart = int(first_is_apart(data))
    with image:
        for number in range(len(frame_delays(data))):
            with library_call(what, lambda error: str(error) or "it has fewer frames than it says"):
                image.seek(number + apart)
                image.load()
                frame = np.asarray(to_rgb(image, Colours(over_white=True))[0])
            yield number, frame


def _since(second: float | None, first: float) -> float | None:
    return None if second is None else max(second - first, 0.0)
