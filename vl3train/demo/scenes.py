"""The demo's pictures: coloured shapes on a plain background, a word, a bar chart. All sizes in pixels."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (220, 30, 30),
    "green": (20, 160, 50),
    "blue": (40, 70, 230),
    "yellow": (245, 215, 20),
    "purple": (150, 40, 190),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle")
MORE_SHAPES = ("diamond", "cross")
"""Those that the demo has not; benchmarks/lessons draw them, too."""
SIDES = ("left", "right", "top", "bottom")
COUNTS = {1: "one", 2: "two", 3: "three", 4: "four"}
WORDS = ("GO", "BUS", "STOP", "TAXI", "MILK")
GROUNDS = ((255, 255, 255), (238, 238, 232), (226, 236, 244), (246, 236, 222))
"""Light backgrounds, so that every colour is visible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One coloured shape, by its centre and half its width."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A picture before it is drawn."""

    width: int
    height: int
    ground: tuple[int, int, int]
    shapes: tuple[Shape, ...] = ()
    word: str | None = None
    word_colour: str = "black"
    bars: tuple[tuple[str, float], ...] = ()  # colour and height as a share of the chart
    description: str = "Nothing."


def draw(scene: Scene) -> Image.Image:
    """The picture of ``scene``, RGB. A thin frame marks where it ends."""
    image = Image.new("RGB", (scene.width, scene.height), scene.ground)
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, scene.width - 1, scene.height - 1), outline=(90, 90, 90), width=2)
    for shape in scene.shapes:
        draw_shape(pen, shape)
    if scene.word is not None:
        draw_word(pen, scene, scene.word)
    if scene.bars:
        draw_bars(pen, scene)
    return image


def draw_shape(pen: ImageDraw.ImageDraw, shape: Shape) -> None:
    """One filled shape."""
    fill = COLOURS[shape.colour]
    x, y, radius = shape.x, shape.y, shape.radius
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape.kind == "circle":
        pen.ellipse(box, fill=fill)
    elif shape.kind == "square":
        pen.rectangle(box, fill=fill)
    elif shape.kind == "triangle":
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=fill)
    elif shape.kind == "diamond":
        pen.polygon([(x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y)], fill=fill)
    elif shape.kind == "cross":
        third = radius / 3
        pen.rectangle((x - radius, y - third, x + radius, y + third), fill=fill)
        pen.rectangle((x - third, y - radius, x + third, y + radius), fill=fill)
    else:
        raise ValueError(f"no shape named {shape.kind!r}; there are {(*SHAPES, *MORE_SHAPES)}")


def draw_word(pen: ImageDraw.ImageDraw, scene: Scene, word: str) -> None:
    """The word in the middle, as large as the picture's width allows."""
    font = ImageFont.load_default(size=scene.width / 3.2)
    pen.text(
        (scene.width / 2, scene.height / 2),
        word,
        fill=COLOURS[scene.word_colour],
        font=font,
        anchor="mm",
        stroke_width=1,
        stroke_fill=COLOURS[scene.word_colour],
    )


def draw_bars(pen: ImageDraw.ImageDraw, scene: Scene) -> None:
    """Bars side by side on a common base line."""
    base = scene.height - 10
    slot = (scene.width - 12) / len(scene.bars)
    pen.line((6, base, scene.width - 6, base), fill=(60, 60, 60), width=2)
    for number, (colour, share) in enumerate(scene.bars):
        left = 6 + number * slot + slot * 0.12
        top = base - share * (scene.height - 20)
        pen.rectangle((left, top, left + slot * 0.76, base - 1), fill=COLOURS[colour])


def random_canvas(rng: random.Random, low: int = 84, high: int = 126) -> Scene:
    """An empty scene of odd size on a random light ground."""
    return Scene(width=rng.randint(low, high), height=rng.randint(low, high), ground=rng.choice(GROUNDS))


def place(rng: random.Random, canvas: Scene, side: str, kind: str, colour: str) -> Shape:
    """A large shape near the middle of one side of ``canvas``."""
    low, high = rng.uniform(0.22, 0.28), rng.uniform(0.72, 0.78)
    across = rng.uniform(0.44, 0.56)
    x, y = {"left": (low, across), "right": (high, across), "top": (across, low), "bottom": (across, high)}[
        side
    ]
    return Shape(
        kind=kind,
        colour=colour,
        x=canvas.width * x,
        y=canvas.height * y,
        radius=min(canvas.width, canvas.height) * rng.uniform(0.17, 0.21),
    )


def one_shape(rng: random.Random) -> tuple[Scene, str]:
    """One shape, and the side it is on."""
    canvas = random_canvas(rng)
    side = rng.choice(SIDES)
    shape = place(rng, canvas, side, rng.choice(SHAPES), rng.choice(list(COLOURS)))
    text = f"A {shape.colour} {shape.kind}, {side}."
    return dataclasses.replace(canvas, shapes=(shape,), description=text), side


def two_shapes(rng: random.Random) -> tuple[Scene, tuple[str, str]]:
    """Two shapes of different colours and kinds on opposite sides, and the sides."""
    canvas = random_canvas(rng)
    sides = rng.choice((("left", "right"), ("top", "bottom")))
    colours, kinds = rng.sample(list(COLOURS), 2), rng.sample(SHAPES, 2)
    first, second = (
        place(rng, canvas, side, kind, colour)
        for side, kind, colour in zip(sides, kinds, colours, strict=True)
    )
    text = f"A {first.colour} {first.kind}, {sides[0]}. A {second.colour} {second.kind}, {sides[1]}."
    return dataclasses.replace(canvas, shapes=(first, second), description=text), sides


def many_shapes(rng: random.Random) -> tuple[Scene, int]:
    """One to four equal shapes in the quarters of a picture, and how many."""
    canvas = random_canvas(rng)
    number = rng.randint(1, 4)
    colour, kind = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    quarters = rng.sample([(0.28, 0.28), (0.72, 0.28), (0.28, 0.72), (0.72, 0.72)], number)
    radius = min(canvas.width, canvas.height) * rng.uniform(0.13, 0.16)
    shapes = tuple(
        Shape(
            kind=kind,
            colour=colour,
            x=canvas.width * (x + rng.uniform(-0.03, 0.03)),
            y=canvas.height * (y + rng.uniform(-0.03, 0.03)),
            radius=radius,
        )
        for x, y in quarters
    )
    text = f"{COUNTS[number].capitalize()} {colour} {kind}{'s' if number > 1 else ''}."
    return dataclasses.replace(canvas, shapes=shapes, description=text), number


def written_word(rng: random.Random) -> tuple[Scene, str]:
    """A picture with one word in it, and the word."""
    word = rng.choice(WORDS)
    colour = rng.choice(("black", "blue", "red"))
    canvas = random_canvas(rng)
    return dataclasses.replace(canvas, word=word, word_colour=colour, description=f"The word {word}."), word


def bar_chart(rng: random.Random) -> tuple[Scene, str]:
    """Three bars of different colours, and the colour of the tallest."""
    colours = rng.sample(list(COLOURS), 3)
    shares = [rng.uniform(0.25, 0.65) for _ in colours]
    tallest = rng.randrange(3)
    shares[tallest] = rng.uniform(0.85, 1.0)
    bars = tuple(zip(colours, shares, strict=True))
    text = f"A chart. The tallest bar is {colours[tallest]}."
    return dataclasses.replace(random_canvas(rng), bars=bars, description=text), colours[tallest]
