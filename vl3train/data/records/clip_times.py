"""What records say of the time of a clip: the piece that is shown, the rate of frames, the times of pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vl3train.contracts.records import SampleError
from vl3train.contracts.strict_json import LARGEST_FLOAT
from vl3train.data.records.media_files import is_nothing

START_KEYS = ("start_time", "video_start", "start")
END_KEYS = ("end_time", "video_end", "end")
FPS_KEYS = ("fps", "sample_fps")
TIMES_KEYS = ("times", "timestamps")
CLIP_KEYS = (*START_KEYS, *END_KEYS, *FPS_KEYS)
"""What is said of a clip: of all clips of a record, or of one in its part. The first key that has a value counts."""


def clip_window(said: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Seconds from which and to which a clip is shown; None: its own beginning and end.

    Raises:
        SampleError: no times, or the end before the start.
    """
    start, end = _first_seconds(said, START_KEYS), _first_seconds(said, END_KEYS)
    if start is not None and end is not None and end < start:
        raise SampleError(f"end_time={end} comes before start_time={start}")
    return start, end


def _first_seconds(said: Mapping[str, Any], keys: Sequence[str]) -> float | None:
    key = next((key for key in keys if not is_nothing(said.get(key))), None)
    return None if key is None else seconds(key, said[key])


def seconds(key: str, value: Any) -> float:
    """Seconds from a number, from a number as text, as a table of text has it, or from 1:02:03.5.

    Raises:
        SampleError: it is none of them.

    >>> seconds("start", "1:02.5")
    62.5
    """
    if isinstance(value, str) and re.fullmatch(r"\s*(\d+:){0,2}\d+(\.\d*)?\s*", value):
        value = sum(float(part) * 60**power for power, part in enumerate(reversed(value.split(":"))))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= LARGEST_FLOAT:
        raise SampleError(f"{key}={value!r} is no time in seconds")
    return float(value)


def clip_rate(said: Mapping[str, Any]) -> float | None:
    """Frames a second that are taken of a clip; of a list of pictures, pictures a second. None: not said.

    Raises:
        SampleError: it is no rate.
    """
    key = next((key for key in FPS_KEYS if not is_nothing(said.get(key))), None)
    if key is None:
        return None
    value = said[key]
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(\.\d*)?\s*", value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= LARGEST_FLOAT:
        raise SampleError(f"{key}={said[key]!r} is no rate; give frames a second, such as 2")
    return float(value)
