"""What a picture's file says beside its pixels: orientation of TIFFs, texts, sizes; and whatever a library raises."""

from __future__ import annotations

import contextlib
import io
import struct

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from transformers.image_utils import load_image

from tests.data.conftest import LIMITS, drawn_picture, picture_bytes
from vl3train.contracts.records import SampleError
from vl3train.data.media.clips import DecodeLimits
from vl3train.data.pictures.images import MAX_TEXT_BYTES, decode_image, image_header
from vl3train.data.pictures.library_errors import library_call

UPRIGHT = {  # what each EXIF orientation asks for, by numpy
    1: lambda picture: picture,
    2: lambda picture: picture[:, ::-1],
    3: lambda picture: picture[::-1, ::-1],
    4: lambda picture: picture[::-1],
    5: lambda picture: picture.swapaxes(0, 1),
    6: lambda picture: np.rot90(picture, -1),
    7: lambda picture: np.rot90(picture, 2).swapaxes(0, 1),
    8: lambda picture: np.rot90(picture),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
def test_a_tiff_is_turned_once_in_size_and_pixels(orientation, compression):
    drawn = drawn_picture(30, 50)
    exif = Image.Exif()
    exif[274] = orientation
    data = picture_bytes(drawn, "TIFF", exif=exif, compression=compression)
    found, header = decode_image(data, LIMITS), image_header(data, LIMITS)
    assert found.shape[:2] == (header.height, header.width)
    np.testing.assert_array_equal(found, np.asarray(load_image(Image.open(io.BytesIO(data)))))
    expected = UPRIGHT[orientation](drawn)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() <= (20 if compression == "jpeg" else 0)


def with_text(size: int, kind: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    if kind == "icc":
        return picture_bytes(drawn_picture(20, 30), "PNG", icc_profile=bytes(size))
    info.add_text("history", "x" * size, zip=kind == "packed")
    return picture_bytes(drawn_picture(20, 30), "PNG", pnginfo=info)


@pytest.mark.parametrize("kind", ["plain", "packed", "icc"])
def test_a_png_with_megabytes_of_text_or_profile_is_read(kind):
    np.testing.assert_array_equal(decode_image(with_text(5_000_000, kind), LIMITS), drawn_picture(20, 30))


def test_text_has_a_limit_of_our_own_that_names_the_way_out():
    bomb = with_text(MAX_TEXT_BYTES + 1, "packed")
    assert len(bomb) < 200_000
    with pytest.raises(SampleError, match=f"over {MAX_TEXT_BYTES} bytes of text.*save it without"):
        decode_image(bomb, LIMITS)


def test_only_our_limit_of_pixels_decides():
    data = bytearray(picture_bytes(drawn_picture(20, 30), "JPEG"))
    at = data.index(b"\xff\xc0")  # start of frame: marker, length, precision, height, width
    data[at + 5 : at + 9] = struct.pack(">HH", 20_000, 20_000)
    with pytest.raises(SampleError, match=r"400000000 pixels is over data.decode_max_pixels=100000000"):
        image_header(bytes(data), DecodeLimits(100_000_000, 1.0))
    assert image_header(bytes(data), DecodeLimits(400_000_000, 1.0)).height == 20_000


def tiff_without(tag: int) -> bytes:
    data = bytearray(picture_bytes(drawn_picture(20, 30), "TIFF"))
    start = struct.unpack_from("<I", data, 4)[0]
    for entry in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", data, start)[0], 12):
        if struct.unpack_from("<H", data, entry)[0] == tag:
            struct.pack_into("<H", data, entry, 65_000)
    return bytes(data)


@pytest.mark.parametrize("tag", [256, 257])
def test_a_tiff_without_dimensions_is_refused(tag):
    with pytest.raises(SampleError, match=r"cannot be read: it is none of.*or its header is damaged"):
        image_header(tiff_without(tag), LIMITS)


@pytest.mark.parametrize("tag", [258, 262, 273, 277, 278, 279])
def test_a_tiff_without_another_tag_raises_nothing_but_a_rejected_sample(tag):
    with contextlib.suppress(SampleError):
        decode_image(tiff_without(tag), LIMITS)


@pytest.mark.parametrize(
    "error", [TypeError("odd"), AttributeError("odd"), ZeroDivisionError("odd"), OSError()]
)
def test_whatever_a_library_raises_is_a_rejected_sample_with_a_reason(error):
    with pytest.raises(SampleError, match=r"thing cannot be read: (odd|OSError)"), library_call("thing"):
        raise error


def test_too_little_memory_is_a_reason_with_a_way_out():
    with pytest.raises(SampleError, match=r"not enough memory.*data.num_workers"), library_call("thing"):
        raise MemoryError


def test_a_bug_of_our_own_is_no_rejected_sample():
    """Only the library's calls are wrapped."""
    with pytest.raises(AttributeError):
        decode_image(picture_bytes(drawn_picture(20, 30), "PNG"), limits=None)  # type: ignore[arg-type]
