"""A clip that is given as a list or folder of pictures, packed as one medium so that everything sees one file.

It is an ordinary zip without compression, which any tool opens: first the member ``clip.json``, ``{"times": [...],
"end": ...}`` in seconds, then one member for each picture, ``00000.jpg`` and so on in their order, with their bytes
untouched. Picture ``i`` is shown from ``times[i]`` on, the last one until ``end``. Without times or a rate, the
pictures follow each other at ``DEFAULT_FPS``, as the original code reads a folder (mm_utils.py: ``vid_fps = 3``).
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vl3train.contracts.records import SampleError
from vl3train.contracts.strict_json import LARGEST_FLOAT, json_text

LIST_SUFFIX = "zip"
"""Of the part in a shard that holds such a clip."""
DEFAULT_FPS = 3.0
HEADER_MEMBER = "clip.json"
START = b"PK\x03\x04"
MOST_PICTURES = 100_000
MAX_HEADER_BYTES = 4_000_000
LONG_AGO = (1980, 1, 1, 0, 0, 0)
"""The same pictures give the same bytes."""


@dataclass(frozen=True, slots=True)
class PictureList:
    """The pictures of a clip, each with the second from which it is shown."""

    pictures: tuple[bytes, ...]
    times: tuple[float, ...]  # as many, rising
    end: float  # when the last picture ends


def pack_pictures(
    pictures: Sequence[tuple[str, bytes]],
    *,
    times: Sequence[float] | None = None,
    fps: float | None = None,
) -> bytes:
    """The zip of some pictures, each with the suffix of its file (``jpg``) and its bytes, in order.

    Args:
        pictures: at least one.
        times: second at which each picture appears; the last one stays as long as the one before it.
        fps: pictures a second, in place of times. Without both it is ``DEFAULT_FPS``.

    Raises:
        SampleError: no pictures or too many, times that do not rise or are not as many, or a rate that is none.
    """
    if not 0 < len(pictures) <= MOST_PICTURES:
        raise SampleError(f"a clip of {len(pictures)} pictures; 1 to {MOST_PICTURES} can be one clip")
    if times is not None and fps is not None:
        raise SampleError("a list of pictures has times or fps, not both; leave one away")
    if times is None:
        rate = DEFAULT_FPS if fps is None else fps
        if not _is_number(rate) or not 0 < rate <= LARGEST_FLOAT:
            raise SampleError(f"fps={rate!r} is no rate; give pictures a second, such as 3")
        shown, end = [number / rate for number in range(len(pictures))], len(pictures) / rate
    else:
        if reason := _wrong_times(times, len(pictures)):
            raise SampleError(reason)
        shown = [float(second) for second in times]
        end = shown[-1] + (shown[-1] - shown[-2] if len(shown) > 1 else 0.0)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        header = json_text({"times": shown, "end": end})
        archive.writestr(zipfile.ZipInfo(HEADER_MEMBER, LONG_AGO), header)
        for number, (suffix, data) in enumerate(pictures):
            archive.writestr(zipfile.ZipInfo(f"{number:05d}.{suffix}", LONG_AGO), data)
    return buffer.getvalue()


def is_picture_list(data: bytes) -> bool:
    """Whether these bytes are a zip, and so no clip of another kind."""
    return data.startswith(START)


def read_picture_list(data: bytes) -> PictureList:
    """What ``pack_pictures`` has packed.

    Raises:
        SampleError: another zip, a damaged or a cut one.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if not members or members[0].filename != HEADER_MEMBER:
                raise SampleError(
                    f"a zip whose first member is no {HEADER_MEMBER}: not a clip as `vl3train shards` packs "
                    "a list of pictures; give the pictures themselves as a list or folder"
                )
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise SampleError("a list of pictures is a zip without compression; pack this one again")
            if members[0].file_size > MAX_HEADER_BYTES or len(members) - 1 > MOST_PICTURES:
                raise SampleError(f"a list of more than {MOST_PICTURES} pictures; cut it into several clips")
            if sum(member.file_size for member in members) > len(data):  # members that share their bytes
                raise SampleError("a list of pictures whose members overlap; pack it again")
            header, *pictures = [archive.read(member) for member in members]
    except SampleError:
        raise
    except Exception as error:  # whatever zipfile raises: it promises no single class
        raise SampleError(
            f"list of pictures of {len(data)} bytes cannot be read: {error!r}; pack it again"
        ) from error
    try:
        fields: Any = json.loads(header)
        times, end = fields["times"], fields["end"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SampleError(
            f"{HEADER_MEMBER} of a list of pictures is damaged: {error!r}; pack it again"
        ) from error
    reason = _wrong_times(times, len(pictures)) if pictures else "a list without pictures"
    if reason is None and (not _is_number(end) or not times[-1] <= end <= LARGEST_FLOAT):
        reason = f"end={end!r} is no time behind the last picture's, {times[-1]}"
    if reason:
        raise SampleError(f"{HEADER_MEMBER} of a list of pictures is damaged: {reason}; pack it again")
    return PictureList(tuple(pictures), tuple(map(float, times)), float(end))


def _wrong_times(times: Any, num_pictures: int) -> str | None:
    if not isinstance(times, (list, tuple)) or len(times) != num_pictures:
        found = f"{len(times)} times" if isinstance(times, (list, tuple)) else f"times {times!r:.80}"
        return f"{found} for {num_pictures} pictures; give one number of seconds for each picture"
    if wrong := [second for second in times if not _is_number(second) or not 0 <= second <= LARGEST_FLOAT]:
        return f"{wrong[0]!r} among the times is no number of seconds from 0 on"
    if back := [(early, late) for early, late in pairwise(times) if late <= early]:
        return f"times must rise: after {back[0][0]} comes {back[0][1]}; sort the pictures by time"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
