"""Draws the demo's clips, in which a shape moves or appears, and encodes them as H.264."""

from __future__ import annotations

import dataclasses
import io
import random
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np

from vl3train.contracts.geometry import time_text
from vl3train.demo.scenes import COLOURS, GROUNDS, SHAPES, Scene, draw, place

SOURCE_FPS = 2
"""Frames a second in the file. Training samples one a second, so it skips every other frame."""
DIRECTIONS = {
    "left": ("right", "left"),
    "right": ("left", "right"),
    "up": ("bottom", "top"),
    "down": ("top", "bottom"),
}
"""Start and end side of a shape that moves this way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """One scene for each frame of the file."""

    frames: tuple[Scene, ...]

    @property
    def description(self) -> str:
        """What is seen at each whole second, after its time."""
        return ",".join(
            time_text(number / SOURCE_FPS) + self.frames[number].description
            for number in range(0, len(self.frames), SOURCE_FPS)
        )


def encode(clip: Clip) -> bytes:
    """``clip`` as an MP4 file with one H.264 stream of ``SOURCE_FPS`` frames a second."""
    file = io.BytesIO()
    with av.open(file, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=SOURCE_FPS)
        stream.width, stream.height = clip.frames[0].width, clip.frames[0].height
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, SOURCE_FPS)
        # One thread: the same bytes everywhere, and a pool of processes encodes many clips at a time.
        stream.codec_context.thread_count = 1
        stream.options = {"preset": "veryfast", "crf": "20", "g": "250"}
        for number, scene in enumerate(clip.frames):
            frame = av.VideoFrame.from_ndarray(np.asarray(draw(scene)), format="rgb24")
            frame.pts = number
            frame.time_base = Fraction(1, SOURCE_FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def even_canvas(rng: random.Random, low: int = 84, high: int = 112) -> Scene:
    """An empty frame; H.264 in 4:2:0 wants even sides."""
    return Scene(
        width=rng.randint(low // 2, high // 2) * 2,
        height=rng.randint(low // 2, high // 2) * 2,
        ground=rng.choice(GROUNDS),
    )


def moving_clip(rng: random.Random, direction: str, seconds: int = 4) -> Clip:
    """A shape that crosses the picture."""
    canvas = even_canvas(rng)
    kind, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
    start_side, end_side = DIRECTIONS[direction]
    start, end = (place(rng, canvas, side, kind, colour) for side in (start_side, end_side))
    last = (seconds - 1) * SOURCE_FPS
    frames = []
    for number in range(seconds * SOURCE_FPS):
        done = min(number / last, 1.0)
        shape = dataclasses.replace(
            start, x=start.x + (end.x - start.x) * done, y=start.y + (end.y - start.y) * done
        )
        side = start_side if done < 0.4 else end_side if done > 0.6 else "middle"
        text = f"A {colour} {kind}, {side}."
        frames.append(dataclasses.replace(canvas, shapes=(shape,), description=text))
    return Clip(frames=tuple(frames))


def appearing_clip(
    rng: random.Random, colours: tuple[str, ...], appear_seconds: tuple[int, ...], seconds: int
) -> Clip:
    """Shapes, one on a side, that appear at the given whole seconds and stay."""
    canvas = even_canvas(rng)
    sides = rng.sample(("left", "right"), len(colours))
    shapes = [
        place(rng, canvas, side, rng.choice(SHAPES), colour)
        for side, colour in zip(sides, colours, strict=True)
    ]
    frames = []
    for number in range(seconds * SOURCE_FPS):
        seen = [i for i, appear in enumerate(appear_seconds) if number >= appear * SOURCE_FPS]
        text = " ".join(f"A {colours[i]} {shapes[i].kind}, {sides[i]}." for i in seen)
        frames.append(
            dataclasses.replace(
                canvas, shapes=tuple(shapes[i] for i in seen), description=text or canvas.description
            )
        )
    return Clip(frames=tuple(frames))
