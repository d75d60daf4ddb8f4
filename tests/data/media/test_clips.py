"""Pixels equal Pillow's and PyAV's, sizes come from the header, damage is refused as a whole."""

from __future__ import annotations

import io
from contextlib import suppress

import av
import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from tests.data.conftest import LIMITS, drawn_picture, picture_bytes, still_and_moving
from vl3train.contracts.geometry import frame_indices
from vl3train.contracts.records import SampleError
from vl3train.data.media.clips import DecodeLimits, decode_clip
from vl3train.data.pictures.images import decode_image, image_header

SAMPLING = {"fps": 2.0, "min_frames": 1, "max_frames": 180, "limits": LIMITS}


def as_transformers_loads(data: bytes) -> np.ndarray:
    return np.asarray(load_image(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_is_bit_equal_to_pillow(subsampling, progressive):
    picture = drawn_picture(61, 75)
    data = picture_bytes(picture, "JPEG", subsampling=subsampling, progressive=progressive, quality=90)
    np.testing.assert_array_equal(decode_image(data, LIMITS), as_transformers_loads(data))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK", "I;16"])
def test_any_colour_mode_becomes_what_transformers_sees(mode):
    picture = Image.fromarray(drawn_picture(31, 44))
    if mode == "I;16":
        picture = Image.fromarray(np.arange(31 * 44, dtype=np.uint16).reshape(31, 44) * 3)
    else:
        picture = picture.convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG" if mode == "CMYK" else "PNG")
    np.testing.assert_array_equal(
        decode_image(buffer.getvalue(), LIMITS), as_transformers_loads(buffer.getvalue())
    )


@pytest.mark.parametrize("form", ["WEBP", "GIF", "BMP", "TIFF"])
def test_other_formats(form):
    data = picture_bytes(drawn_picture(31, 44), form)
    np.testing.assert_array_equal(decode_image(data, LIMITS), as_transformers_loads(data))
    header = image_header(data, LIMITS)
    assert (header.height, header.width) == (31, 44)


@pytest.mark.parametrize("orientation", [*range(10), 65535])  # beyond 8 it means nothing
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_exif_orientation_is_applied_to_size_and_pixels(orientation, form):
    exif = Image.Exif()
    exif[274] = orientation
    data = picture_bytes(drawn_picture(30, 50), form, exif=exif.tobytes())
    decoded = decode_image(data, LIMITS)
    np.testing.assert_array_equal(decoded, as_transformers_loads(data))
    header = image_header(data, LIMITS)
    assert decoded.shape[:2] == (header.height, header.width)


def test_an_exif_orientation_that_is_no_number_turns_nothing():
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + b"\x01\x12\0\x02\0\0\0\x02X\0\0\0" + bytes(4)
    data = picture_bytes(drawn_picture(30, 50), "JPEG", exif=exif)
    np.testing.assert_array_equal(decode_image(data, LIMITS), as_transformers_loads(data))


def test_the_same_damage_has_the_same_reason():
    """The index is told apart by its reasons: a place in memory in one made a new plan of the same shards."""
    reasons = set()
    for _ in range(3):
        with pytest.raises(SampleError) as caught:
            image_header(b"<html>404</html>", LIMITS)
        reasons.add(str(caught.value))
    assert reasons == {
        "image of 16 bytes cannot be read: it is none of JPEG, PNG, WEBP, GIF, BMP, TIFF, or its header is damaged; "
        "fetch it again, or save it again if a viewer shows it"
    }


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.9])
def test_a_truncated_image_is_refused(form, keep):
    data = picture_bytes(drawn_picture(61, 75), form)
    with pytest.raises(SampleError, match="cannot be read"):
        decode_image(data[: int(len(data) * keep)], LIMITS)


def test_a_damaged_jpeg_is_refused_where_pillow_reads_on():
    data = bytearray(picture_bytes(drawn_picture(200, 300), "JPEG", quality=90))
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    assert Image.open(io.BytesIO(data)).convert("RGB").size == (300, 200)
    with pytest.raises(SampleError):
        decode_image(bytes(data), LIMITS)


def test_pixel_limit_is_checked_on_the_header():
    whole = picture_bytes(drawn_picture(100, 100), "PNG")
    header_only = whole[:60]
    with pytest.raises(SampleError, match="decode_max_pixels=9999"):
        decode_image(header_only, DecodeLimits(max_pixels=9999, max_seconds=1.0))


def test_postscript_is_not_an_image():
    with pytest.raises(SampleError):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", LIMITS)


@pytest.mark.parametrize(
    ("codec", "suffix"),
    [(codec, suffix) for codec in ("h264", "mpeg4", "mjpeg") for suffix in ("mkv", "avi")]
    + [("h264", "mp4"), ("libvpx", "webm"), ("libvpx-vp9", "webm")],
)
def test_clip_frames_equal_plain_pyav(encode_clip, codec, suffix):
    data = encode_clip(still_and_moving(40, 48, 64), rate=10, codec=codec, suffix=suffix)
    with av.open(io.BytesIO(data)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    clip = decode_clip(data, **SAMPLING)
    picked = frame_indices(len(every), 10.0, fps=2.0, min_frames=1, max_frames=180)
    assert picked == [0, 5, 10, 15, 20, 25, 30, 35]
    np.testing.assert_array_equal(clip.frames, np.stack([every[number] for number in picked]))
    np.testing.assert_allclose(clip.times, [number / 10 for number in picked], atol=1e-3)


@pytest.mark.parametrize(
    ("start", "end", "times"),
    [
        (1.0, 3.0, (1.0, 1.5, 2.0, 2.5)),
        (2.5, None, (2.5, 3.0, 3.5)),
        (None, 0.6, (0.0,)),
        (2.04, 2.05, (2.0,)),  # falls between two frames: the one before
        (3.95, 9.0, (3.9,)),
    ],
)
def test_start_and_end(encode_clip, start, end, times):
    frames = still_and_moving(40, 48, 64)
    data = encode_clip(frames, rate=10, options={"g": "10"})
    clip = decode_clip(data, **SAMPLING, start_seconds=start, end_seconds=end)
    assert clip.times == pytest.approx(times)
    for picture, time in zip(clip.frames, times, strict=True):
        assert np.abs(picture.astype(int) - frames[round(time * 10)]).mean() < 12


def test_start_behind_the_end_is_refused(encode_clip):
    data = encode_clip(still_and_moving(20, 48, 64), rate=10)
    with pytest.raises(SampleError, match="start_time=30"):
        decode_clip(data, **SAMPLING, start_seconds=30.0)


def test_variable_frame_rate_gives_real_times(encode_clip):
    pts = [0, 1, 2, 3, 10, 20, 30, 40]
    data = encode_clip(still_and_moving(8, 48, 64), rate=10, suffix="mkv", pts=pts)
    clip = decode_clip(data, fps=100.0, min_frames=1, max_frames=180, limits=LIMITS)
    assert clip.times == pytest.approx([stamp / 10 for stamp in pts])


def test_min_and_max_frames(encode_clip):
    data = encode_clip(still_and_moving(40, 48, 64), rate=10)
    assert len(decode_clip(data, fps=0.1, min_frames=4, max_frames=180, limits=LIMITS).times) == 4
    assert len(decode_clip(data, fps=10.0, min_frames=1, max_frames=7, limits=LIMITS).times) == 7


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_truncated_and_garbage_clips_are_refused(encode_clip, suffix):
    frames = [drawn_picture(48, 64, seed) for seed in range(40)]
    data = encode_clip(frames, rate=10, suffix=suffix)
    for keep in (0.0, 0.01, 0.5, 0.8):
        with pytest.raises(SampleError):
            decode_clip(data[: int(len(data) * keep)], **SAMPLING)
    with pytest.raises(SampleError):
        decode_clip(bytes(np.random.default_rng(0).bytes(5000)), **SAMPLING)


def test_damage_inside_a_clip_is_refused_or_leaves_every_frame(encode_clip):
    data = bytearray(encode_clip([drawn_picture(48, 64, seed) for seed in range(40)], rate=10))
    middle = len(data) // 2
    data[middle : middle + 3000] = bytes(3000)
    with suppress(SampleError):
        assert len(decode_clip(bytes(data), **SAMPLING).times) == 8


def test_clip_limits_are_checked_on_the_header(encode_clip):
    data = encode_clip(still_and_moving(40, 48, 64), rate=10)
    for limits, reason in (
        (DecodeLimits(max_pixels=48 * 64 - 1, max_seconds=60.0), "decode_max_pixels"),
        (DecodeLimits(max_pixels=48 * 64, max_seconds=3.0), "decode_max_seconds"),
    ):
        with pytest.raises(SampleError, match=reason):
            decode_clip(data, **{**SAMPLING, "limits": limits})


def test_a_playlist_is_not_a_clip(tmp_path, monkeypatch, encode_clip):
    """FFmpeg would open the files it names: a sample must not read what lies outside it."""
    (tmp_path / "part.mkv").write_bytes(encode_clip(still_and_moving(20, 48, 64), rate=10, suffix="mkv"))
    monkeypatch.chdir(tmp_path)
    text = b"ffconcat version 1.0\nfile part.mkv\n"
    with av.open(io.BytesIO(text)) as container:
        assert next(container.decode(video=0)).width == 64
    with pytest.raises(SampleError):
        decode_clip(text, **SAMPLING)


@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
def test_a_turned_clip_stands_upright(encode_clip, quarter_turns):
    """A phone writes how it was held as a matrix in the track header (ISO 14496-12, 8.3.2)."""
    frames = [drawn_picture(48, 64, seed) for seed in range(4)]
    data = bytearray(encode_clip(frames, rate=10, options={"crf": "5"}))
    one = 1 << 16
    cos, sin = {1: (0, one), 2: (-one, 0), 3: (0, -one)}[quarter_turns]  # clockwise on the screen
    matrix = [cos, sin, 0, -sin, cos, 0, 0, 0, 1 << 30]
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    clip = decode_clip(bytes(data), fps=10.0, min_frames=1, max_frames=10, limits=LIMITS)
    upright = np.rot90(frames[0], -quarter_turns)
    assert clip.frames.shape[1:] == upright.shape
    difference = np.abs(clip.frames[0].astype(int) - upright).mean()
    assert difference < 20 < np.abs(clip.frames[0].astype(int) - np.rot90(upright, 2)).mean()
