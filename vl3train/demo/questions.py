"""The demo's tasks: a picture, clip or text, a question about it, and the one right answer."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from vl3train.demo.clips import DIRECTIONS, Clip, appearing_clip, moving_clip
from vl3train.demo.scenes import (
    COLOURS,
    COUNTS,
    Scene,
    bar_chart,
    many_shapes,
    one_shape,
    two_shapes,
    written_word,
)

THINGS = ("ball", "box", "cup", "hat", "door", "car")
PLACES = ("first", "second", "last")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One sample of the demo: a picture, a clip or neither, with a question and its answer."""

    task: str
    question: str
    answer: str
    picture: Scene | None = None
    clip: Clip | None = None

    @property
    def in_words(self) -> str:
        """The question after a description of its picture or clip: the language model is pre-trained on it."""
        if self.clip is not None:
            return f"{self.clip.description}\n{self.question}"
        if self.picture is not None:
            return f"{self.picture.description}\n{self.question}"
        return self.question


def caption(rng: random.Random) -> Question:
    """A picture of any kind, described."""
    picture = rng.choice((one_shape, two_shapes, many_shapes, written_word, bar_chart))(rng)[0]
    ask = rng.choice(("Describe the picture.", "What is in the picture?", "Write a caption."))
    return Question(task="captions", question=ask, answer=picture.description, picture=picture)


def count(rng: random.Random) -> Question:
    """How many shapes are there?"""
    picture, number = many_shapes(rng)
    kind = picture.shapes[0].kind
    ask = rng.choice(
        (f"How many {kind}s are there?", "How many shapes are in the picture?", f"Count the {kind}s.")
    )
    return Question(task="count", question=ask, answer=COUNTS[number], picture=picture)


def colour(rng: random.Random) -> Question:
    """Which colour has the shape?"""
    picture, _ = one_shape(rng)
    (shape,) = picture.shapes
    ask = rng.choice((f"What colour is the {shape.kind}?", "Which colour has the shape?", "Name the colour."))
    return Question(task="colour", question=ask, answer=shape.colour, picture=picture)


def shape(rng: random.Random) -> Question:
    """Which shape is it?"""
    picture, _ = one_shape(rng)
    (drawn,) = picture.shapes
    ask = rng.choice(("What shape is this?", "Which shape is it?", f"What is the {drawn.colour} shape?"))
    return Question(task="shape", question=ask, answer=drawn.kind, picture=picture)


def position(rng: random.Random) -> Question:
    """On which side is the shape?"""
    picture, side = one_shape(rng)
    (drawn,) = picture.shapes
    ask = rng.choice(
        (f"Where is the {drawn.colour} {drawn.kind}?", "Where is the shape?", f"Where is the {drawn.kind}?")
    )
    return Question(task="position", question=ask, answer=side, picture=picture)


def word(rng: random.Random) -> Question:
    """Which word is written there?"""
    picture, written = written_word(rng)
    ask = rng.choice(("Which word is written here?", "Read the word.", "What does the picture say?"))
    return Question(task="word", question=ask, answer=written, picture=picture)


def chart(rng: random.Random) -> Question:
    """Which bar is the tallest?"""
    picture, tallest = bar_chart(rng)
    ask = rng.choice(
        ("Which bar is the tallest?", "What colour is the tallest bar?", "Name the tallest bar's colour.")
    )
    return Question(task="chart", question=ask, answer=tallest, picture=picture)


def text(rng: random.Random) -> Question:
    """A question about a list that it states itself."""
    listed = rng.sample((*THINGS, *COLOURS), 3)
    place = rng.randrange(3)
    ask = rng.choice(("Which word is {}?", "Name the {} word.", "What is the {} word?"))
    return Question(
        task="text",
        question=f"A list: {', '.join(listed)}. {ask.format(PLACES[place])}",
        answer=listed[place],
    )


def motion(rng: random.Random) -> Question:
    """Which way does the shape move?"""
    direction = rng.choice(list(DIRECTIONS))
    clip = moving_clip(rng, direction)
    kind = clip.frames[0].shapes[0].kind
    ask = rng.choice(
        (f"Which way does the {kind} move?", "Which way does the shape move?", f"Where does the {kind} go?")
    )
    return Question(task="motion", question=ask, answer=direction, clip=clip)


def order(rng: random.Random) -> Question:
    """Which of two shapes appears first?"""
    colours = rng.sample(list(COLOURS), 2)
    first = rng.randint(0, 2)
    clip = appearing_clip(rng, tuple(colours), (first, rng.randint(first + 1, 3)), seconds=4)
    ask = rng.choice(
        ("Which colour appears first?", "What colour appears first?", "Which colour comes first?")
    )
    return Question(task="order", question=ask, answer=colours[0], clip=clip)


def when(rng: random.Random) -> Question:
    """At which second does the shape appear?"""
    second = rng.randint(1, 4)
    clip = appearing_clip(rng, (rng.choice(list(COLOURS)),), (second,), seconds=5)
    kind = clip.frames[-1].shapes[0].kind
    ask = rng.choice((f"When does the {kind} appear?", "When does the shape appear?"))
    return Question(task="when", question=ask, answer=f"{second}.0s", clip=clip)


TASKS: dict[str, Callable[[random.Random], Question]] = {
    "captions": caption,
    "count": count,
    "colour": colour,
    "shape": shape,
    "position": position,
    "word": word,
    "chart": chart,
    "text": text,
    "motion": motion,
    "order": order,
    "when": when,
}
