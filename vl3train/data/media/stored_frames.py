"""A clip as the frames that training takes of it, decoded once. Reading a stored frame is about 70 times cheaper.

A core reads 2,927 stored frames a second, and takes 41 from 720p video at one frame a second (benchmarks/README.md:
1,029 source frames, 25 for each that is taken).

A stored clip is one line of JSON and then JPEGs end to end: ``{"vl3train_frames": 1, "rule": ..., "height": ...,
"width": ..., "times": [...], "sizes": [...]}``. Frames have the size that the model sees. The rule by which they
were taken is in the header. A sample whose settings ask for another rule is rejected: other frames are not stored.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import simplejpeg

from vl3train.contracts.records import SampleError
from vl3train.contracts.strict_json import json_text
from vl3train.data.media.clips import ClipPlan, DecodeLimits
from vl3train.data.video.timeline import FrameRule

STORED_SUFFIX = "frames"
START = b'{"vl3train_frames": 1'
JPEG_QUALITY = 95
"""With 4:2:0, as the clips themselves have it."""
MAX_HEADER_BYTES = 1_000_000


def is_stored(data: bytes) -> bool:
    """Whether these are stored frames and not a clip."""
    return data.startswith(START)


def pack_frames(frames: Iterable[np.ndarray], times: Iterable[float], rule: FrameRule) -> bytes:
    """Frames, each (height, width, 3) uint8 and all of one size, as a stored clip."""
    jpegs, shape = [], (0, 0)
    for frame in frames:
        shape = frame.shape[:2]
        jpegs.append(
            simplejpeg.encode_jpeg(
                np.ascontiguousarray(frame), quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="420"
            )
        )
    header = {
        "vl3train_frames": 1,
        "rule": dataclasses.asdict(rule),
        "height": shape[0],
        "width": shape[1],
        "times": list(times),
        "sizes": [len(jpeg) for jpeg in jpegs],
    }
    return json_text(header).encode() + b"\n" + b"".join(jpegs)


def plan_stored(data: bytes, rule: FrameRule, limits: DecodeLimits) -> ClipPlan:
    """All the frames of a stored clip.

    Raises:
        SampleError: damaged, over the limits, or taken by another rule.
    """
    header, _ = _header(data)
    asked = dataclasses.asdict(rule)
    if (stored := header["rule"]) != asked:
        differing = [
            f"{key}={stored.get(key)}, now {value}"
            for key, value in asked.items()
            if stored.get(key) != value
        ]
        raise SampleError(f"frames were stored with {'; '.join(differing)}; store them again from the clips")
    height, width, times = header["height"], header["width"], header["times"]
    if not times or height * width > limits.max_pixels:
        raise SampleError(f"stored clip of {len(times)} frames of {width}x{height} pixels; store it again")
    every = tuple(range(len(times)))
    return ClipPlan(height, width, tuple(times), every, (0, len(every)), None)


def read_stored(data: bytes, plan: ClipPlan) -> Iterator[np.ndarray]:
    """The planned frames, each (height, width, 3) uint8 RGB."""
    header, position = _header(data)
    for number, size in enumerate(header["sizes"][: len(plan.picked)]):
        try:
            frame: np.ndarray = simplejpeg.decode_jpeg(data[position : position + size], "RGB")
        except ValueError as error:
            raise SampleError(f"stored frame {number} cannot be read: {error}; store it again") from error
        if frame.shape != (plan.height, plan.width, 3):
            raise SampleError(f"stored frame {number} is of size {frame.shape[1::-1]}; store it again")
        position += size
        yield frame


def _header(data: bytes) -> tuple[dict[str, Any], int]:
    """The header, and where the first JPEG begins."""
    end = data.find(b"\n", 0, MAX_HEADER_BYTES)
    try:
        header = json.loads(data[: max(end, 0)])
        numbers = [header["height"], header["width"], *header["sizes"], *header["times"]]
        whole = (
            isinstance(header["rule"], dict)
            and all(isinstance(number, (int, float)) and number >= 0 for number in numbers)
            and all(
                isinstance(number, int) for number in (header["height"], header["width"], *header["sizes"])
            )
            and len(header["sizes"]) == len(header["times"])
            and end + 1 + sum(header["sizes"]) == len(data)
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SampleError(
            f"stored clip of {len(data)} bytes cannot be read: {error!r}; store it again"
        ) from error
    if not whole:
        raise SampleError(f"stored clip of {len(data)} bytes is damaged or cut off; store it again")
    return header, end + 1
