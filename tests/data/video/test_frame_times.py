"""Files as people have them: pictures that stay at the end are whole files, files that are cut off are refused."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from tests.data.conftest import LIMITS, drawn_picture, still_and_moving
from vl3train.contracts.records import SampleError
from vl3train.data.media.clips import decode_clip
from vl3train.data.video.frame_times import fraction_of

SAMPLING = {"fps": 1.0, "min_frames": 1, "max_frames": 180, "limits": LIMITS}


def pictures_at(encode_clip, seconds: list[float], suffix: str, **options) -> bytes:
    return encode_clip(
        [drawn_picture(48, 64, seed) for seed in range(len(seconds))],
        rate=10,
        suffix=suffix,
        pts=[round(second * 10) for second in seconds],
        **options,
    )


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", "h264"), ("mkv", "h264"), ("webm", "libvpx"), ("avi", "mpeg4")]
)
def test_slides_are_seen_as_long_as_they_stay(encode_clip, suffix, codec):
    # an MP4's last frame lasts as long as the one before it, elsewhere it has one frame's duration
    data = pictures_at(encode_clip, [0, 5, 10] if suffix == "mp4" else [0, 5, 10, 15], suffix, codec=codec)
    clip = decode_clip(data, **SAMPLING)
    assert clip.times == pytest.approx(range(15), abs=0.1)
    for number in range(15):
        assert (clip.frames[number] == clip.frames[number - number % 5]).all()


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_motion_and_then_a_still(encode_clip, suffix):
    reordered = "0" if suffix == "avi" else "2"  # AVI has no time of presentation for B-frames
    moving = [number / 10 for number in range(50)]
    data = pictures_at(encode_clip, [*moving, 19.9], suffix, options={"bf": reordered})
    clip = decode_clip(data, **SAMPLING)
    assert len(clip.times) == 20
    assert (clip.frames[6] == clip.frames[19]).all()


def test_a_stream_that_starts_late_begins_with_its_first_frame(encode_clip):
    data = pictures_at(encode_clip, [7 + number / 10 for number in range(40)], "mkv")
    assert decode_clip(data, **SAMPLING).times == pytest.approx((0, 1, 2, 3))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_a_still_file_that_is_cut_off_is_refused(encode_clip, suffix):
    data = pictures_at(encode_clip, [number * 0.3 for number in range(60)], suffix)
    assert len(decode_clip(data, **SAMPLING).times) == 18
    for keep in (0.4, 0.7):
        with pytest.raises(SampleError):
            decode_clip(data[: int(len(data) * keep)], **SAMPLING)


def test_an_avi_with_empty_chunks_is_whole(encode_clip):
    pictures, still = still_and_moving(40, 48, 64), {"bf": "0"}
    plain = encode_clip(pictures, rate=10, options=still)
    data = encode_clip(
        pictures, rate=600, suffix="avi", pts=[60 * number for number in range(40)], options=still
    )
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].frames > 2300  # as ``ffmpeg -c copy`` writes them
    clip = decode_clip(data, **SAMPLING)
    assert clip.times == pytest.approx((0, 1, 2, 3))
    assert np.abs(clip.frames.astype(int) - decode_clip(plain, **SAMPLING).frames).mean() < 2
    with pytest.raises(SampleError, match="cut off"):
        decode_clip(data[: int(len(data) * 0.3)], **SAMPLING)


class Ratio:
    """As PyAV 19's AVRational, of which only the two numbers and the truth are taken."""

    def __init__(self, numerator, denominator):
        self.numerator, self.denominator = numerator, denominator

    def __bool__(self):
        return bool(self.numerator and self.denominator)


def test_ratios_of_every_pyav_become_fractions():
    """PyAV 19 needs Python 3.12; the whole path ran with it by hand, here is its one door."""
    assert fraction_of(Ratio(30000, 1001)) == fraction_of(Fraction(30000, 1001)) == Fraction(30000, 1001)
    assert fraction_of(Ratio(0, 1)) is fraction_of(Ratio(1, 0)) is fraction_of(None) is None
