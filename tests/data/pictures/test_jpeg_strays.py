"""A JPEG on which libjpeg only warns is read as Pillow reads it; a scan in which the decoder lost its place is not."""

from __future__ import annotations

import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from tests.data.conftest import LIMITS, drawn_picture, picture_bytes
from vl3train.contracts.records import SampleError
from vl3train.data.pictures.images import JPEG_WARNING, decode_image, decode_picture

FORMS = {"baseline": {}, "progressive": {"progressive": True}, "restarts": {"restart_marker_blocks": 8}}


def jpeg(seed: int = 0, **options) -> bytes:
    return picture_bytes(drawn_picture(75, 110, seed), "JPEG", quality=90, **options)


def as_pillow_reads(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def before_marker(data: bytes, marker: int, stray: bytes) -> bytes:
    at = data.rindex(bytes([0xFF, marker]))
    return data[:at] + stray + data[at:]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stray", [bytes(258), b"\x55" * 40, bytes(7) + b"\xff" * 30], ids=repr)
def test_a_repeated_byte_before_the_end_mark_is_read(form, stray):
    data = before_marker(jpeg(**FORMS[form]), 0xD9, stray)
    picture = decode_picture(data, LIMITS)
    np.testing.assert_array_equal(picture.pixels, as_pillow_reads(data))
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(data, "RGB")
    assert picture.remarks == (JPEG_WARNING,)


@pytest.mark.parametrize("seed", range(4))
def test_any_bytes_behind_a_scan_that_ends_where_it_should_are_read(seed):
    data = before_marker(jpeg(seed), 0xD9, b"written by a scanner" * (1 + seed))
    np.testing.assert_array_equal(decode_image(data, LIMITS), as_pillow_reads(data))


@pytest.mark.parametrize("marker", [0xC0, 0xC4, 0xDB, 0xDA])
def test_bytes_between_the_header_s_segments_are_read(marker):
    data = before_marker(jpeg(), marker, b"\0garbage")
    picture = decode_picture(data, LIMITS)
    np.testing.assert_array_equal(picture.pixels, as_pillow_reads(data))
    assert picture.remarks == (JPEG_WARNING,)


def test_an_unknown_revision_or_parameters_that_mean_nothing_are_read():
    whole = jpeg()
    revision, parameters = bytearray(whole), bytearray(whole)
    revision[whole.index(b"JFIF\0") + 5] = 7
    parameters[whole.index(b"\xff\xda") + 12] = 9
    for data in (bytes(revision), bytes(parameters)):
        with pytest.raises(ValueError, match=r"JFIF|SOS"):
            simplejpeg.decode_jpeg(data, "RGB")
        picture = decode_picture(data, LIMITS)
        np.testing.assert_array_equal(picture.pixels, as_pillow_reads(data))
        assert picture.remarks == (JPEG_WARNING,)


def test_a_whole_jpeg_has_no_remark():
    assert decode_picture(jpeg(), LIMITS).remarks == ()


@pytest.mark.parametrize("form", FORMS)
def test_a_cut_scan_is_refused_whatever_stands_behind_it(form):
    data = jpeg(**FORMS[form])
    cut = data[: len(data) * 2 // 3]
    for damaged in (cut, cut + b"\xff\xd9", cut + bytes(200) + b"\xff\xd9"):
        with pytest.raises(SampleError, match="cannot be read"):
            decode_image(damaged, LIMITS)


def test_most_scans_in_which_the_decoder_lost_its_place_are_refused_though_it_says_extraneous_bytes():
    rng = np.random.default_rng(0)
    said = refused = 0
    whole = [jpeg(seed) for seed in range(5)]
    while said < 40:
        data = bytearray(whole[said % 5])
        at = int(rng.integers(data.index(b"\xff\xda") + 14, len(data) - 150))
        data[at : at + 100] = bytes(100)
        try:
            simplejpeg.decode_jpeg(bytes(data), "RGB")
        except ValueError as error:
            if "extraneous" not in str(error):
                continue
            said += 1
            try:
                decode_image(bytes(data), LIMITS)
            except SampleError:
                refused += 1
    assert refused >= 0.65 * said


def test_a_jpeg_in_cmyk_is_as_strict_though_pillow_decodes_it():
    buffer = io.BytesIO()
    Image.fromarray(drawn_picture(75, 110)).convert("CMYK").save(buffer, "JPEG", quality=90)
    whole = buffer.getvalue()
    assert decode_picture(whole, LIMITS).remarks == ()
    strays = before_marker(whole, 0xD9, bytes(50))
    picture = decode_picture(strays, LIMITS)
    assert picture.remarks == (JPEG_WARNING,)
    np.testing.assert_array_equal(picture.pixels, as_pillow_reads(whole))
    damaged = whole[: len(whole) * 2 // 3] + b"\xff\xd9"
    assert as_pillow_reads(damaged).shape == (75, 110, 3)  # without a word
    with pytest.raises(SampleError, match="damaged"):
        decode_picture(damaged, LIMITS)
