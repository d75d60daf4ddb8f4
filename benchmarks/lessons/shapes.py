"""Tasks about shapes in one or two pictures."""

from __future__ import annotations

import dataclasses
import random

from benchmarks.lessons.lesson import Lesson, others, thing
from vl3train.demo.scenes import GROUNDS, Scene, Shape

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
PLACES = {(-1, 0): "left of", (1, 0): "right of", (0, -1): "above", (0, 1): "below"}


def canvas(rng: random.Random, *, wide: bool = False) -> Scene:
    """An empty picture; ``wide`` ones have other sizes and aspect ratios, on their side or upright."""
    sides = [rng.randint(150, 196), rng.randint(84, 98)] if wide else [rng.randint(98, 140) for _ in "wh"]
    rng.shuffle(sides)
    return Scene(width=sides[0], height=sides[1], ground=rng.choice(GROUNDS))


def scattered(rng: random.Random, empty: Scene, things: list[tuple[str, str]]) -> Scene:
    """``empty`` with the things in cells of a grid of three by three, none twice."""
    cells = rng.sample([(x, y) for x in range(3) for y in range(3)], len(things))
    placed = tuple(at(rng, empty, one, *cell) for one, cell in zip(things, cells, strict=True))
    return dataclasses.replace(empty, shapes=placed)


def at(rng: random.Random, empty: Scene, one: tuple[str, str], column: int, row: int) -> Shape:
    """One thing near the middle of a cell of the grid."""
    small = min(empty.width, empty.height)
    return Shape(
        kind=one[1],
        colour=one[0],
        x=empty.width * ((column + 0.5) / 3 + rng.uniform(-0.02, 0.02)),
        y=empty.height * ((row + 0.5) / 3 + rng.uniform(-0.02, 0.02)),
        radius=small * rng.uniform(0.10, 0.13),
    )


def said(things: list[tuple[str, str]]) -> str:
    """The things in words."""
    return " ".join(f"A {colour} {kind}." for colour, kind in things)


def caption(rng: random.Random, split: str, level: int) -> Lesson:
    """One to three things in a row, described from left to right."""
    things = [thing(rng, split)]
    things += others(rng, level - 1, colours=[things[0][0]])
    rng.shuffle(things)
    empty, row = canvas(rng), rng.randrange(3)
    columns = sorted(rng.sample(range(3), len(things)))
    placed = tuple(at(rng, empty, one, column, row) for one, column in zip(things, columns, strict=True))
    text = said(things)
    shown = dataclasses.replace(empty, shapes=placed)
    return Lesson(
        question="Describe the picture from left to right.", answer=text, words=text, media=(shown,)
    )


def attributes(rng: random.Random, split: str, level: int) -> Lesson:
    """Colour of a shape, or shape of a colour, among one to three things."""
    colour, kind = thing(rng, split)
    things = [(colour, kind), *others(rng, level - 1, colours=[colour], kinds=[kind])]
    rng.shuffle(things)
    ask, answer = rng.choice(((f"Which colour is the {kind}?", colour), (f"Which shape is {colour}?", kind)))
    return Lesson(
        question=ask, answer=answer, words=said(things), media=(scattered(rng, canvas(rng), things),)
    )


def counting(rng: random.Random, split: str, level: int) -> Lesson:
    """One to five of the same thing; from level 2 on beside things that do not count."""
    number = rng.randint(1, 5)
    colour, kind = thing(rng, "train")
    things = [(colour, kind)] * number
    if level > 1:
        things = things + [rng.choice(others(rng, 1, colours=[colour])) for _ in range(rng.randint(0, level))]
    ask = f"How many {colour} shapes are there?"
    shown = scattered(rng, canvas(rng, wide=split == "new"), things)
    return Lesson(question=ask, answer=NUMBERS[number], words=said(things), media=(shown,))


def relations(rng: random.Random, split: str, level: int) -> Lesson:
    """What is left of, right of, above or below a thing; from level 2 on with a thing on its other side."""
    middle = thing(rng, "train")
    colour, kind = thing(rng, split)
    while colour == middle[0]:
        colour, kind = thing(rng, split)
    empty = canvas(rng)
    (dx, dy), place = rng.choice(list(PLACES.items()))
    placed = [at(rng, empty, middle, 1, 1), at(rng, empty, (colour, kind), 1 + dx, 1 + dy)]
    words = f"A {colour} {kind} is {place} the {middle[0]} {middle[1]}."
    if level > 1:
        (opposite,) = others(rng, 1, colours=[colour, middle[0]])
        placed.append(at(rng, empty, opposite, 1 - dx, 1 - dy))
        words += f" A {opposite[0]} {opposite[1]} is {PLACES[-dx, -dy]} it."
    shown = dataclasses.replace(empty, shapes=tuple(placed))
    ask = f"What is {place} the {middle[0]} {middle[1]}?"
    return Lesson(question=ask, answer=f"{colour} {kind}", words=words, media=(shown,))


def comparison(rng: random.Random, split: str, level: int) -> Lesson:
    """In which of two pictures is a thing, or where there are more shapes."""
    if level == 1:
        colour, kind = thing(rng, split)
        things = [[(colour, kind)], others(rng, 1, colours=[colour])]
        ask = f"Which picture has the {colour} {kind}?"
    else:
        few = rng.randint(1, 3)
        one = thing(rng, split)
        things = [[one] * rng.randint(few + 1, 5), [one] * few]
        ask = "Which picture has more shapes?"
    first = rng.random() < 0.5
    if not first:
        things.reverse()
    words = f"First: {said(things[0])} Second: {said(things[1])}"
    shown = tuple(scattered(rng, canvas(rng), one) for one in things)
    return Lesson(question=ask, answer="first" if first else "second", words=words, media=shown)
