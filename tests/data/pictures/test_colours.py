"""Deep grey and transparency: transformers' pixels by default, the picture itself by option, a remark in any case."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from transformers import VideoLlama3ImageProcessor
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from tests.data.conftest import LIMITS, drawn_picture
from vl3train.data.pictures.colours import (
    AS_TRANSFORMERS,
    DEEP_GREY,
    DROPPED_TRANSPARENCY,
    OVER_WHITE,
    SCALED_GREY,
    Colours,
    scaled_grey,
)
from vl3train.data.pictures.images import decode_picture, image_header

SCALE, WHITE = Colours(scale_grey=True), Colours(over_white=True)


def saved(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def grey(values: np.ndarray, form: str = "PNG", **options) -> bytes:
    return saved(Image.fromarray(values), form, **options)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


TWELVE_BITS = np.repeat(np.array([[0, 1200], [3000, 4095]], np.uint16), 15, axis=1)


def test_a_twelve_bit_picture_keeps_its_grey_values_by_option():
    data = grey(TWELVE_BITS)
    assert image_header(data, LIMITS).remarks == (DEEP_GREY,)
    plain, scaled = decode_picture(data, LIMITS), decode_picture(data, LIMITS, colours=SCALE)
    np.testing.assert_array_equal(plain.pixels, np.asarray(load_image(opened(data))))
    assert plain.remarks == (DEEP_GREY,)
    np.testing.assert_array_equal(scaled.pixels[:, ::15, 0], [[0, 75], [187, 255]])
    assert scaled.remarks == (SCALED_GREY,)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 128, 255]], np.uint16), [0, 128, 255]),  # 8 bits in 16: as it is
        (np.array([[0, 511, 1023]], np.uint16), [0, 127, 255]),
        (np.array([[0, 32768, 65535]], np.uint16), [0, 128, 255]),
        (np.array([[0, 32768, 65535]], ">u2"), [0, 128, 255]),
        (np.array([[-1000, 1048, 3096]], np.int32), [0, 128, 255]),  # tomography
        (np.array([[0, 1 << 19, 1 << 20]], np.int32), [0, 128, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[np.nan, np.inf, 4095.0]], np.float32), [0, 0, 255]),
        (np.zeros((1, 3), np.uint16), [0, 0, 0]),
    ],
)
def test_grey_of_any_depth_is_scaled_by_its_own_depth(values, expected):
    assert scaled_grey(values).tolist() == [expected]


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4", "<f4"])
def test_tiffs_of_every_deep_grey_are_as_transformers_by_default_and_scaled_by_option(dtype):
    values = np.linspace(0, 4000, 12 * 16).reshape(12, 16).astype(dtype)
    data = grey(values, "TIFF")
    picture = decode_picture(data, LIMITS)
    np.testing.assert_array_equal(picture.pixels, np.asarray(load_image(opened(data))))
    assert picture.remarks == (DEEP_GREY,)
    scaled = decode_picture(data, LIMITS, colours=SCALE).pixels[..., 0]
    np.testing.assert_allclose(scaled, values.astype(float) * 255 / 4095, atol=0.51)


def test_shallow_grey_in_a_deep_file_is_not_remarked_once_it_is_decoded():
    data = grey(np.arange(200, dtype=np.uint16).reshape(10, 20))
    assert decode_picture(data, LIMITS).remarks == ()
    for colours in (AS_TRANSFORMERS, SCALE):
        found = decode_picture(data, LIMITS, colours=colours).pixels
        np.testing.assert_array_equal(found[..., 0].reshape(-1), np.arange(200))


def transparent(mode: str) -> bytes:
    rgba = np.dstack([drawn_picture(20, 30), np.linspace(0, 255, 600).reshape(20, 30).astype(np.uint8)])
    picture = Image.fromarray(rgba)
    if mode == "P":
        return saved(picture.convert("RGB").quantize(16), transparency=3)
    if mode == "RGB":
        return saved(picture.convert("RGB"), transparency=tuple(map(int, rgba[5, 5, :3])))
    if mode == "L":
        return saved(picture.convert("L"), transparency=int(np.asarray(picture.convert("L"))[5, 5]))
    return saved(picture.convert(mode)) if mode != "WEBP" else saved(picture, "WEBP", lossless=True)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "WEBP"])
def test_transparency_is_dropped_as_by_path_or_laid_over_white_as_the_processor_does(mode):
    data = transparent(mode)
    dropped, white = decode_picture(data, LIMITS), decode_picture(data, LIMITS, colours=WHITE)
    np.testing.assert_array_equal(dropped.pixels, np.asarray(load_image(opened(data))))
    assert dropped.remarks == (DROPPED_TRANSPARENCY,)
    np.testing.assert_array_equal(white.pixels, convert_to_rgb(opened(data), return_numpy=True))
    assert white.remarks == (OVER_WHITE,)
    assert not np.array_equal(dropped.pixels, white.pixels)


def test_a_black_drawing_on_clear_ground_is_black_on_white_by_option():
    rgba = np.zeros((20, 30, 4), np.uint8)
    rgba[5:10, 5:25, 3] = 255
    data = saved(Image.fromarray(rgba))
    assert decode_picture(data, LIMITS).pixels.max() == 0
    found = decode_picture(data, LIMITS, colours=WHITE).pixels
    assert found[0, 0].tolist() == [255] * 3
    assert found[7, 7].tolist() == [0] * 3


def test_an_alpha_band_without_a_transparent_pixel_is_not_remarked_once_it_is_decoded():
    data = saved(Image.fromarray(drawn_picture(20, 30)).convert("RGBA"))
    assert image_header(data, LIMITS).remarks == (DROPPED_TRANSPARENCY,)
    assert decode_picture(data, LIMITS).remarks == ()


def test_a_transparent_grey_value_of_sixteen_bits_becomes_white():
    values = np.full((10, 10), 4000, np.uint16)
    values[0] = 77
    data = grey(values, transparency=77)
    found = decode_picture(data, LIMITS, colours=Colours(True, True)).pixels
    assert found[0].min() == 255
    assert found[1].max() == round(4000 * 255 / 4095)


@pytest.mark.parametrize(
    ("mode", "form"), [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "TIFF"), ("LAB", "TIFF"), ("1", "PNG")]
)
def test_other_modes_are_as_transformers_whatever_the_options(mode, form):
    image = Image.fromarray(drawn_picture(20, 30))
    if mode == "LAB":
        image = Image.frombytes("LAB", (30, 20), drawn_picture(20, 30).tobytes())
    data = saved(image.convert(mode), form)
    expected = np.asarray(load_image(opened(data)))
    for colours in (AS_TRANSFORMERS, Colours(True, True)):
        picture = decode_picture(data, LIMITS, colours=colours)
        np.testing.assert_array_equal(picture.pixels, expected)
        assert picture.remarks == ()


def test_an_export_s_processor_lays_pil_pictures_over_white_and_drops_transparency_by_path(tmp_path):
    """Both sides of docs/prepare_data.md, with the transformers that is installed."""
    data = transparent("RGBA")
    (tmp_path / "a.png").write_bytes(data)
    processor = VideoLlama3ImageProcessor()

    def patches(picture) -> np.ndarray:
        return processor(images=picture, return_tensors="np")["pixel_values"]

    white, dropped = (decode_picture(data, LIMITS, colours=each).pixels for each in (WHITE, AS_TRANSFORMERS))
    np.testing.assert_array_equal(patches(opened(data)), patches(white))
    np.testing.assert_array_equal(patches(processor.fetch_images(str(tmp_path / "a.png"))), patches(dropped))
