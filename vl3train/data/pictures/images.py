"""Images from bytes: size from the header first, then pixels. Whatever is wrong raises SampleError.

What is read may come from anywhere. So the formats are named (no PostScript), the header is checked against the
limits before anything is decoded, and a damaged file is rejected as a whole.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import simplejpeg
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from vl3train.contracts.records import SampleError
from vl3train.data.media.clips import DecodeLimits
from vl3train.data.pictures.colours import AS_TRANSFORMERS, Colours, header_remarks, to_rgb
from vl3train.data.pictures.jpeg_strays import decode_without_strays
from vl3train.data.pictures.library_errors import library_call

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
EXIF_ORIENTATION = 274
TURN = {  # the same table as PIL.ImageOps.exif_transpose
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = {TURN[orientation] for orientation in (5, 6, 7, 8)}

JPEG_WARNING = "a JPEG with stray bytes or odd header values, on which libjpeg only warns; read as it stands"

MAX_TEXT_BYTES = 64 * 2**20
"""Of texts and colour profile in a PNG, unpacked. Pillow's own limit is 1 MiB, which editors' histories exceed."""
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = MAX_TEXT_BYTES
Image.MAX_IMAGE_PIXELS = None  # data.decode_max_pixels decides, on the header too


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What decides how a picture is decoded and shown."""

    height: int  # as it is shown, EXIF orientation applied
    width: int
    turn: Image.Transpose | None  # after decoding
    jpeg: bool  # for simplejpeg
    inked: bool  # a JPEG in CMYK: Pillow decodes it, and passes over damage on which libjpeg only warns
    remarks: tuple[str, ...]  # what may be lost, as far as the header says
    colours: Colours  # to decode with


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded picture."""

    pixels: np.ndarray  # (height, width, 3) uint8 RGB
    remarks: tuple[str, ...]  # what was lost or odd; each names the option that helps


def image_header(data: bytes, limits: DecodeLimits, colours: Colours = AS_TRANSFORMERS) -> ImageHeader:
    """What the header alone says."""
    with _opened_image(data, limits) as image:
        with _reading(data):
            width, height = image.size
            # Pillow shows a TIFF upright by itself, its size too, while the tag still says how it lies in the file.
            tag = 1 if image.format == "TIFF" else image.getexif().get(EXIF_ORIENTATION, 1)
        turn = TURN.get(tag)  # none for values that mean nothing
        return ImageHeader(
            *((width, height) if turn in SIDEWAYS else (height, width)),
            turn=turn,
            jpeg=image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"),
            inked=image.format in ("JPEG", "MPO") and image.mode == "CMYK",
            remarks=header_remarks(image, colours),
            colours=colours,
        )


def decode_image(
    data: bytes,
    limits: DecodeLimits,
    header: ImageHeader | None = None,
    colours: Colours = AS_TRANSFORMERS,
) -> np.ndarray:
    """(height, width, 3) uint8 RGB: the pixels of ``decode_picture``."""
    return decode_picture(data, limits, header, colours).pixels


def decode_picture(
    data: bytes,
    limits: DecodeLimits,
    header: ImageHeader | None = None,
    colours: Colours = AS_TRANSFORMERS,
) -> Picture:
    """The picture as transformers' ``load_image`` makes it, but for ``colours``; a truncated file is rejected.

    JPEG goes through simplejpeg: 1.6 to 2.7 times as fast, the same bits as Pillow's decoder, and strict about
    damage. ``header`` saves reading it again, and has its own colours.
    """
    header = header or image_header(data, limits, colours)
    found = _decode_jpeg(data) if header.jpeg else None
    if found is not None:
        if header.turn is None:
            return found
        return Picture(np.asarray(Image.fromarray(found.pixels).transpose(header.turn)), found.remarks)
    checked = _decode_jpeg(data, "CMYK") if header.inked else None
    with _opened_image(data, limits) as image:
        with _reading(data):
            image.load()
            rgb, remarks = to_rgb(image, header.colours)
        pixels = np.asarray(rgb if header.turn is None else rgb.transpose(header.turn))
    if pixels.shape[:2] != (header.height, header.width):
        shown = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise SampleError(
            f"image of {header.width}x{header.height} by its header decodes to {shown}; save it anew"
        )
    return Picture(pixels, (*remarks, *(checked.remarks if checked else ())))


def _decode_jpeg(data: bytes, colourspace: str = "RGB") -> Picture | None:
    """None: for Pillow, as TurboJPEG's interface names six chroma layouts only."""
    reason = ""
    try:
        return Picture(_turbo_jpeg(data, colourspace), ())
    except MemoryError:
        raise
    except Exception as error:  # it promises ValueError only, whatever it finds
        reason = str(error)
    if "subsampling" in reason:
        return None
    pixels = decode_without_strays(data, partial(_turbo_jpeg, colourspace=colourspace))
    if pixels is None:
        raise SampleError(
            f"image of {len(data)} bytes cannot be read: {reason}; it is damaged, fetch it again"
        )
    return Picture(pixels, (JPEG_WARNING,))


def _turbo_jpeg(data: bytes, colourspace: str) -> np.ndarray:
    pixels: np.ndarray = simplejpeg.decode_jpeg(data, colourspace)
    return pixels


@contextmanager
def _opened_image(data: bytes, limits: DecodeLimits) -> Iterator[Image.Image]:
    with _reading(data):
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    with image:
        width, height = image.size
        if not width * height:
            raise SampleError(f"image of {width}x{height} pixels: it is empty; leave it out")
        if width * height > limits.max_pixels:
            raise SampleError(
                f"image of {width}x{height} = {width * height} pixels is over "
                f"data.decode_max_pixels={limits.max_pixels}; shrink it or raise the limit"
            )
        if image.format == "TIFF":
            with _reading(data):
                pages = getattr(image, "n_frames", 1)
            if pages > 1:
                raise SampleError(f"a TIFF of {pages} pages: write each page as a picture of its own")
        yield image


@contextmanager
def _reading(data: bytes) -> Iterator[None]:
    with library_call(f"image of {len(data)} bytes", _reason):
        yield


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        # Pillow names an address in memory, which differs from run to run; the index's fingerprint covers the reasons.
        return f"it is none of {', '.join(IMAGE_FORMATS)}, or its header is damaged"
    if "MAX_TEXT_CHUNK" in str(error) or "text chunks" in str(error):
        return f"over {MAX_TEXT_BYTES} bytes of text or colour profile; save it without them"
    return str(error)
