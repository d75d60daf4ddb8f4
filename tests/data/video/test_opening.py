"""Whatever leaves the decoding library is a rejected sample; the video that people watch is the one that is read."""

from __future__ import annotations

import io
from contextlib import suppress

import av
import numpy as np
import pytest

from tests.data.conftest import LIMITS, drawn_picture, picture_bytes, still_and_moving
from vl3train.contracts.records import SampleError
from vl3train.data.media.clips import decode_clip

SAMPLING = {"fps": 2.0, "min_frames": 1, "max_frames": 180, "limits": LIMITS}


@pytest.mark.parametrize("damage", [b"VideoHandle\xfc", b"\xff\xfe\x80\x81\x82\x83\x84\x85\x86\x87\x88\x89"])
def test_a_clip_whose_handler_is_not_utf8_is_used(encode_clip, damage):
    data = encode_clip(still_and_moving(20, 48, 64), rate=10)
    assert b"VideoHandler" in data
    clip = decode_clip(data.replace(b"VideoHandler", damage), **SAMPLING)
    np.testing.assert_array_equal(clip.frames, decode_clip(data, **SAMPLING).frames)


def test_a_codec_that_nobody_knows_is_named(encode_clip):
    data = encode_clip(still_and_moving(20, 48, 64), rate=10)
    with pytest.raises(SampleError, match="does not know the codec of its video, 'xvc9'"):
        decode_clip(data.replace(b"avc1", b"xvc9"), **SAMPLING)


def file_with(tmp_path, suffix, *, cover=False, thumbnail=False, sound=False, video=0):
    """A file of a cover picture, a video of one picture, a second of sound, and a video, each if asked for."""
    path = tmp_path / f"file.{suffix}"
    with av.open(str(path), "w") as container:
        streams = []
        if cover or thumbnail:
            first = container.add_stream("mjpeg" if cover else "h264", rate=10)
            first.width, first.height, first.pix_fmt = 32, 32, "yuvj420p" if cover else "yuv420p"
            if cover:
                first.disposition = av.stream.Disposition.attached_pic
            streams.append((first, [drawn_picture(32, 32)]))
        if video:
            second = container.add_stream("h264", rate=10)
            second.width, second.height, second.pix_fmt = 64, 48, "yuv420p"
            streams.append((second, still_and_moving(video, 48, 64)))
        tone = container.add_stream("aac", rate=16000) if sound else None
        for stream, pictures in streams:
            for picture in pictures:
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        if tone is not None:
            wave = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            wave.rate = 16000
            container.mux(tone.encode(wave))
            container.mux(tone.encode())
    return path.read_bytes()


def test_sound_with_a_cover_picture_is_no_video(tmp_path):
    with pytest.raises(SampleError, match="no video stream but a cover picture"):
        decode_clip(file_with(tmp_path, "mp4", cover=True, sound=True), **SAMPLING)


@pytest.mark.parametrize(("suffix", "first"), [("mp4", "cover"), ("mp4", "thumbnail"), ("mkv", "thumbnail")])
def test_the_video_behind_a_picture_is_read(tmp_path, suffix, first):
    clip = decode_clip(file_with(tmp_path, suffix, video=20, **{first: True}), **SAMPLING)
    assert clip.frames.shape == (4, 48, 64, 3)


def test_a_clip_of_one_picture_is_read(tmp_path):
    assert decode_clip(file_with(tmp_path, "mp4", thumbnail=True), **SAMPLING).frames.shape == (1, 32, 32, 3)


def test_no_mutated_clip_ends_a_pass(encode_clip):
    """A few here, of each container; the error of our own code would not be caught."""
    rng = np.random.default_rng(0)
    for suffix in ("mp4", "mkv", "avi"):
        whole = encode_clip(still_and_moving(12, 48, 64), rate=10, suffix=suffix)
        for _ in range(40):
            data = bytearray(whole)
            for at in rng.integers(0, len(data), rng.integers(1, 8)):
                data[at] = rng.integers(0, 256)
            with suppress(SampleError):
                assert decode_clip(bytes(data), **SAMPLING).frames.ndim == 4


def test_a_picture_is_no_clip():
    with pytest.raises(SampleError, match="cannot be read"):
        decode_clip(io.BytesIO(picture_bytes(drawn_picture(30, 40))).getvalue(), **SAMPLING)
