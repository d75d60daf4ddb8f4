"""Clocks that start anew, before 0, or not at all; stamps that are missing; rates that change: the frames of the time.

What is right is computed here by hand: the last frame that begins at or before a time. Frames are told apart by PyAV's
plain decoding of the same file, from its first frame to its last.
"""

from __future__ import annotations

import doctest
import io
from bisect import bisect_right

import av
import numpy as np
import pytest

from tests.data.conftest import LIMITS, drawn_picture
from vl3train.data.media.clips import decode_clip
from vl3train.data.video import mended_stamps as stamps_module
from vl3train.data.video.mended_stamps import mended_stamps

SAMPLING = {"fps": 1.0, "min_frames": 1, "max_frames": 180, "limits": LIMITS}
TENTHS = list(range(60))
WRAPS = 2**33 / 90000
"""Seconds after which the 33 bits of an MPEG-TS clock begin anew: 26.5 hours."""
PICTURES = [drawn_picture(32, 48, number) for number in range(106)]


def made(encode_clip, pts, suffix="ts", rate=10, **options):
    return encode_clip(
        PICTURES[: len(pts)], rate=rate, suffix=suffix, pts=pts, options={"bf": "2", "g": "12", **options}
    )


def every_frame(data):
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def assert_shown(data, seconds, num_frames=None, **window):
    """The frames taken of a clip are those on the screen at their times; ``seconds`` say when each frame begins."""
    clip, frames = decode_clip(data, **SAMPLING, **window), every_frame(data)
    assert len(frames) == len(seconds)
    assert num_frames in (None, len(clip.times))
    for time, picture in zip(clip.times, clip.frames, strict=True):
        shown = max(bisect_right(seconds, time + 0.002) - 1, 0)
        assert bool((picture == frames[shown]).all()), f"at {time}"


def without_stamps(data, keeps):
    """An MPEG-TS without the stamps of pictures, counted in the file's order, for which ``keeps`` is false."""
    found, picture = bytearray(data), 0
    for packet in range(0, len(found), 188):
        video = (found[packet + 1] & 31) << 8 | found[packet + 2] == 0x100
        if not video or not found[packet + 1] & 0x40:
            continue
        header = packet + 4 + (1 + found[packet + 4] if found[packet + 3] & 0x20 else 0)
        assert found[header : header + 3] == b"\0\0\1"
        if not keeps(picture):
            length = found[header + 8]
            found[header + 7] &= 0x3F
            found[header + 9 : header + 9 + length] = b"\xff" * length
        picture += 1
    return bytes(found)


def test_doctests():
    assert doctest.testmod(stamps_module).failed == 0


@pytest.mark.parametrize("starts", [0, 1000, WRAPS - 70, WRAPS - 3, WRAPS - 0.2], ids=lambda s: f"{s:.0f}")
def test_a_clock_that_wraps_within_the_clip(encode_clip, starts):
    data = made(encode_clip, [round(starts * 10) + tenth for tenth in TENTHS])
    seconds = [tenth / 10 for tenth in TENTHS]
    assert_shown(data, seconds, 6)
    assert_shown(data, seconds, 3, start_seconds=2.0, end_seconds=5.0)
    assert decode_clip(data, **SAMPLING, start_seconds=2.0, end_seconds=5.0).times == pytest.approx((2, 3, 4))


@pytest.mark.parametrize("suffix", ["ts", "mp4", "mkv", "flv"])
def test_a_rate_that_changes_in_the_middle(encode_clip, suffix):
    pts = [5 * number for number in range(30)] + [150 + 2 * number for number in range(76)]
    data, seconds = made(encode_clip, pts, suffix, rate=50), [stamp / 50 for stamp in pts]
    assert_shown(data, seconds, 6)
    assert_shown(data, seconds, 3, start_seconds=2.0, end_seconds=5.0)


def test_what_an_mp4_shows_before_its_beginning_is_not_shown(encode_clip):
    """Its edit list begins at 0. Matroska has no time before 0: the clip is shifted."""
    pts = [tenth - 20 for tenth in TENTHS]
    assert_shown(made(encode_clip, pts, "mp4"), [tenth / 10 for tenth in range(40)], 4)
    assert_shown(made(encode_clip, pts, "mkv"), [tenth / 10 for tenth in TENTHS], 6)


KEEPS = {"every fifth": lambda n: n % 5 == 0, "two of three": lambda n: n % 3 != 1, "all but the first": bool}


@pytest.mark.parametrize("reordered", ["0", "2"])
@pytest.mark.parametrize("kept", KEEPS)
def test_stamps_that_are_missing_lie_between_their_neighbours(encode_clip, kept, reordered):
    data = without_stamps(made(encode_clip, TENTHS, bf=reordered), KEEPS[kept])
    seconds = [tenth / 10 for tenth in TENTHS]
    assert_shown(data, seconds)
    times = decode_clip(data, **SAMPLING).times
    assert times[-1] - times[0] == pytest.approx(5, abs=0.4)
    assert_shown(data, seconds, 3, start_seconds=2.0, end_seconds=5.0)


@pytest.mark.parametrize("later", [0, 3, 500], ids=["from 0", "from 0.3 s", "ahead"])
def test_recordings_put_behind_each_other_are_one_after_the_other(encode_clip, later):
    moving, still = list(range(30)), [0, 25, 50]
    data = made(encode_clip, moving) + made(encode_clip, [later + stamp for stamp in still], bf="0")
    seconds = [tenth / 10 for tenth in moving] + [3 + tenth / 10 for tenth in still]
    clip = decode_clip(data, **SAMPLING)
    assert 7 <= len(clip.times) <= 11  # the last picture stays for 0.1 to 2.5 s
    assert_shown(data, seconds)


def test_mended_stamps_of_a_clip_that_stops_and_starts_are_those_of_the_whole():
    random = np.random.default_rng(0)
    for _ in range(50):
        gaps = random.integers(1, 40, 40)
        whole = np.concatenate([[0], np.cumsum(gaps)])
        cut = int(random.integers(2, 40))
        gaps[cut - 1] = gaps[cut - 2]  # between parts it is the gap before them
        whole = np.concatenate([[0], np.cumsum(gaps)])
        parts = [*whole[:cut].tolist(), *(whole[cut:] - whole[cut]).tolist()]
        if parts[cut - 1] >= 10:
            assert mended_stamps(parts, stamps_module.BACK_SECONDS / 10, None, "mpegts") == tuple(
                whole.tolist()
            )
        assert mended_stamps(whole.tolist(), stamps_module.BACK_SECONDS, None, "mpegts") is None
        assert mended_stamps(parts, stamps_module.BACK_SECONDS, None, "matroska,webm") is None
