"""From a decoded picture of any mode to RGB. By default as transformers' ``load_image``: Pillow's ``convert("RGB")``.

That shows grey of more than 8 bits white wherever it is over 255, and drops transparency, so that the colours behind it
show: a black drawing on transparent ground is often all black. ``Colours`` can ask for better. Such pictures are
remarked in any case.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from vl3train.contracts.records import RenderSettings

DEEP_GREY = "grey of more than 8 bits, shown white wherever it is over 255; data.grey16=scale keeps it"
SCALED_GREY = "grey of more than 8 bits, scaled by data.grey16=scale"
DROPPED_TRANSPARENCY = (
    "transparent; the colours behind it show; data.transparent=white lays such pictures over white"
)
OVER_WHITE = "transparent; laid over white by data.transparent=white"

DEPTHS = (8, 10, 12, 14, 16)
"""Bits a grey value of sensors and scanners has, whatever room the file gives it."""


@dataclass(frozen=True, slots=True)
class Colours:
    """How pictures that are no 8-bit colour or grey become RGB; the defaults are transformers'."""

    scale_grey: bool = False  # data.grey16=scale
    over_white: bool = False  # data.transparent=white


AS_TRANSFORMERS = Colours()


def colours_of(settings: RenderSettings) -> Colours:
    """What the options of a run ask for."""
    return Colours(scale_grey=settings.grey16 == "scale", over_white=settings.transparent == "white")


def is_deep_grey(image: Image.Image) -> bool:
    """Whether it is grey with values that may be over 255."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def may_be_transparent(image: Image.Image) -> bool:
    """Whether it has an alpha band or names a transparent colour: what transformers from 5.21 on lays over white."""
    return "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None


def header_remarks(image: Image.Image, colours: Colours) -> tuple[str, ...]:
    """What may be lost of a picture, as its header says; ``to_rgb`` knows whether it is."""
    remarks = []
    if is_deep_grey(image):
        remarks.append(SCALED_GREY if colours.scale_grey else DEEP_GREY)
    if may_be_transparent(image):
        remarks.append(OVER_WHITE if colours.over_white else DROPPED_TRANSPARENCY)
    return tuple(remarks)


def to_rgb(image: Image.Image, colours: Colours) -> tuple[Image.Image, tuple[str, ...]]:
    """The loaded picture in mode RGB, and what is remarkable: grey that is over 255, pixels that are transparent."""
    remarks = []
    deep = None
    if is_deep_grey(image):
        deep = np.asarray(image)
        if np.nanmax(deep, initial=0) > 255 or image.mode == "F":
            remarks.append(SCALED_GREY if colours.scale_grey else DEEP_GREY)
    alpha = _alpha(image)
    if alpha is not None and np.asarray(alpha).min(initial=255) < 255:
        remarks.append(OVER_WHITE if colours.over_white else DROPPED_TRANSPARENCY)
    if colours.scale_grey and deep is not None:
        rgb = Image.fromarray(scaled_grey(deep)).convert("RGB")
    elif colours.over_white and alpha is not None and deep is None:
        rgba = _with_alpha(image)
        rgb = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), rgba).convert("RGB")
    else:
        rgb = image.convert("RGB")
    if colours.over_white and alpha is not None and deep is not None:
        rgb.paste((255, 255, 255), mask=alpha.point(lambda value: 255 - value))
    return rgb, tuple(remarks)


def scaled_grey(values: np.ndarray) -> np.ndarray:
    """Grey values of any depth as uint8: 0 stays black, and the largest value of the picture's depth becomes white.

    The depth is the smallest of 8, 10, 12, 14 and 16 bits that holds the largest value, so a 12-bit X-ray in a 16-bit
    file is divided by 4095 / 255 and keeps its picture, and two pictures of one sensor are treated alike. Dividing by
    257 would leave it nearly black; stretching from smallest to largest value would make one bright spot decide. Floats
    up to 1 have 1 as white. Values over 16 bits, and negative ones (computed tomography), have no such depth: they are
    stretched from the smallest, or 0, to the largest. What is no number is black.
    """
    found = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    least, most = min(0.0, float(found.min(initial=0))), float(found.max(initial=0))
    white = most
    if least == 0:
        if values.dtype.kind == "f" and most <= 1:
            white = 1.0
        else:
            white = next((2.0**bits - 1 for bits in DEPTHS if most < 2**bits), most)
    return np.rint((found - least) * (255 / max(white - least, 1e-300))).astype(np.uint8)


def _alpha(image: Image.Image) -> Image.Image | None:
    """How opaque each pixel is, in mode L; None where all are."""
    if not may_be_transparent(image):
        return None
    if is_deep_grey(image):
        transparent = np.asarray(image) == image.info["transparency"]
        return Image.fromarray(np.where(transparent, 0, 255).astype(np.uint8))
    return _with_alpha(image).getchannel("A")


def _with_alpha(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    return image.convert("RGBA")
