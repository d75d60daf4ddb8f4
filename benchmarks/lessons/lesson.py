"""One task's sample before it is written: what is shown, a question about it, and the one right answer."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from vl3train.demo.clips import Clip, encode
from vl3train.demo.scenes import COLOURS, MORE_SHAPES, SHAPES, Scene, draw

HELD_OUT_SPLITS = ("same", "new")
"""``same`` is held out and drawn as ``train`` is. ``new`` is held out and draws what ``train`` never does."""
KINDS = (*SHAPES, *MORE_SHAPES)
THINGS = [(colour, kind) for colour in COLOURS for kind in KINDS]
HELD_OUT = [(colour, kind) for colour, kind in zip(COLOURS, KINDS, strict=False)]
"""Colours of shapes that only ``new`` draws: one of each shape. Each shape is seen in five colours, so that its colour
and its kind can be told apart."""
SEEN = [thing for thing in THINGS if thing not in HELD_OUT]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Lines of text on a white page. ``size`` is that of the letters in pixels."""

    width: int
    height: int
    lines: tuple[str, ...]
    size: int
    left: int = 6
    top: int = 4

    def drawn(self) -> Image.Image:
        """The page, RGB."""
        image = Image.new("RGB", (self.width, self.height), (252, 252, 250))
        pen = ImageDraw.Draw(image)
        font = ImageFont.load_default(size=self.size)
        for number, line in enumerate(self.lines):
            pen.text((self.left, self.top + number * self.size * 1.35), line, fill=(10, 10, 10), font=font)
        return image


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """``words`` says what is shown: the language model is pre-trained on it in place of the media."""

    question: str
    answer: str
    words: str = ""
    media: tuple[Scene | Page | Clip, ...] = ()

    @property
    def in_words(self) -> str:
        """The question behind the words."""
        return f"{self.words}\n{self.question}" if self.words else self.question


def encoded(medium: Scene | Page | Clip, square: int | None = None) -> tuple[str, bytes]:
    """Suffix and bytes: an MP4 file of a clip, a PNG of a page, a JPEG of a scene.

    Pictures are resized to ``square`` x ``square`` pixels where that is given.
    """
    if isinstance(medium, Clip):
        return "mp4", encode(medium)
    image = medium.drawn() if isinstance(medium, Page) else draw(medium)
    if square is not None:
        image = image.resize((square, square), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    if isinstance(medium, Page):
        image.save(file, "PNG", compress_level=3)
        return "png", file.getvalue()
    image.save(file, "JPEG", quality=92)
    return "jpg", file.getvalue()


def thing(rng: random.Random, split: str) -> tuple[str, str]:
    """Colour and shape of what is asked about."""
    return rng.choice(HELD_OUT if split == "new" else SEEN)


def others(
    rng: random.Random, count: int, *, colours: Sequence[str] = (), kinds: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """``count`` things besides it, all of different colours; none of the given colours or shapes."""
    found: list[tuple[str, str]] = []
    while len(found) < count:
        one = rng.choice(SEEN)
        if one[0] not in [*colours, *(colour for colour, _ in found)] and one[1] not in kinds:
            found.append(one)
    return found
