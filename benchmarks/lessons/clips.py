"""Tasks about clips. Everything happens at whole seconds, where training looks: one frame a second."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from benchmarks.lessons.lesson import Lesson, others, thing
from benchmarks.lessons.shapes import NUMBERS
from vl3train.contracts.geometry import time_text
from vl3train.demo.clips import DIRECTIONS, SOURCE_FPS, Clip, even_canvas
from vl3train.demo.scenes import Scene, Shape

WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
assert set(WAYS) == set(DIRECTIONS)


def shape(empty: Scene, one: tuple[str, str], x: float, y: float, radius: float = 0.14) -> Shape:
    """One thing at a share of the width and height."""
    small = min(empty.width, empty.height)
    return Shape(kind=one[1], colour=one[0], x=empty.width * x, y=empty.height * y, radius=small * radius)


def filmed(empty: Scene, seconds: int, seen: Callable[[float], list[Shape]]) -> Clip:
    """A clip that shows ``seen(time)``."""
    times = [number / SOURCE_FPS for number in range(seconds * SOURCE_FPS)]
    return Clip(frames=tuple(dataclasses.replace(empty, shapes=tuple(seen(time))) for time in times))


def told(seconds: int, words: Callable[[int], str]) -> str:
    """What each second shows, behind its time."""
    return ",".join(f"{time_text(second)}{words(second)}" for second in range(seconds))


def length(rng: random.Random, split: str, shortest: int, longest: int) -> int:
    """Seconds of a clip; ``new`` ones are up to half longer than any of ``train``."""
    return rng.randint(longest + 1, longest * 3 // 2) if split == "new" else rng.randint(shortest, longest)


def moving(empty: Scene, one: tuple[str, str], way: str, done: float, lane: float = 0.5) -> Shape:
    """One thing that has come ``done`` of its way, from side to side in its lane."""
    dx, dy = WAYS[way]
    along = 0.2 + 0.6 * done
    x, y = (along if dx > 0 else 1 - along, lane) if dx else (lane, along if dy > 0 else 1 - along)
    return shape(empty, one, x, y)


def direction(rng: random.Random, split: str, level: int) -> Lesson:
    """Which way a thing goes; from level 2 on beside one that goes elsewhere."""
    one, way = thing(rng, split), rng.choice(list(WAYS))
    movers = [(one, way, rng.uniform(0.3, 0.7) if level == 1 else 0.25)]
    if level > 1:
        back = {"left": "right", "right": "left", "up": "down", "down": "up"}[way]
        movers.append((others(rng, 1, colours=[one[0]])[0], rng.choice((way, back)), 0.75))
    seconds, empty = rng.randint(4, 5), even_canvas(rng)
    clip = filmed(
        empty,
        seconds,
        lambda time: [moving(empty, a, b, min(1.0, time / (seconds - 1)), lane) for a, b, lane in movers],
    )
    words = " ".join(f"The {a[0]} {a[1]} moves {b}." for a, b, _ in movers)
    return Lesson(question=f"Which way moves the {one[0]} {one[1]}?", answer=way, words=words, media=(clip,))


def speed(rng: random.Random, split: str, level: int) -> Lesson:
    """Which of two things is faster."""
    fast = thing(rng, split)
    (slow,) = others(rng, 1, colours=[fast[0]])
    share = {1: 0.2, 2: 0.4, 3: 0.6}[level]
    ways, seconds, empty = rng.choice((("left", "right"), ("up", "down"))), 4, even_canvas(rng)
    lanes = rng.sample((0.25, 0.75), 2)
    movers = [(one, rng.choice(ways), lane) for one, lane in zip((fast, slow), lanes, strict=True)]
    clip = filmed(
        empty,
        seconds,
        lambda time: [
            moving(empty, one, way, min(1.0, time / 3) * factor, lane)
            for (one, way, lane), factor in zip(movers, (1.0, share), strict=True)
        ],
    )
    words = f"The {fast[0]} {fast[1]} is faster than the {slow[0]} {slow[1]}."
    return Lesson(question="Which colour is faster?", answer=fast[0], words=words, media=(clip,))


def order(rng: random.Random, split: str, level: int) -> Lesson:
    """Things appear one after the other and stay: the colour of the first, second, ..."""
    things = others(rng, level + 1)
    seconds = length(rng, split, 6, 9)
    starts = sorted(rng.sample(range(1, seconds), len(things)))
    cells = rng.sample([(x, y) for x in (0.2, 0.5, 0.8) for y in (0.25, 0.75)], len(things))
    empty = even_canvas(rng)
    clip = filmed(
        empty,
        seconds,
        lambda time: [
            shape(empty, a, *c) for a, b, c in zip(things, starts, cells, strict=True) if time >= b
        ],
    )
    place = rng.randrange(len(things))
    words = told(
        seconds,
        lambda second: " ".join(a[0] for a, b in zip(things, starts, strict=True) if second >= b) or "empty",
    )
    ask = f"Which colour appears {('first', 'second', 'third', 'fourth')[place]}?"
    return Lesson(question=ask, answer=things[place][0], words=words, media=(clip,))


def events(rng: random.Random, split: str, level: int) -> Lesson:
    """How often a thing flashes, for a second each time."""
    one, seconds, empty = thing(rng, "train"), length(rng, split, 6, 9), even_canvas(rng)
    number = rng.randint(1, min(level + 2, seconds // 2))
    gaps = sorted(rng.sample(range(seconds - number), number))
    shown = {1 + i + gap for i, gap in enumerate(gaps)}  # the gaps differ, so no two flashes are neighbours
    x, y = rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7)
    clip = filmed(empty, seconds, lambda time: [shape(empty, one, x, y, 0.2)] if int(time) in shown else [])
    words = told(seconds, lambda second: one[0] if second in shown else "empty")
    return Lesson(
        question=f"How often does the {one[1]} flash?", answer=NUMBERS[number], words=words, media=(clip,)
    )


def grounding(rng: random.Random, split: str, level: int) -> Lesson:
    """From when to when a thing is seen; from level 2 on beside one that is always there."""
    one, seconds, empty = thing(rng, "train"), length(rng, split, 6, 10), even_canvas(rng)
    start = rng.randint(1, seconds - 3)
    end = rng.randint(start + 2, seconds - 1)
    cells = rng.sample((0.25, 0.75), 2)
    always = [shape(empty, others(rng, 1, colours=[one[0]])[0], cells[1], 0.5)] if level > 1 else []
    clip = filmed(
        empty,
        seconds,
        lambda time: always + ([shape(empty, one, cells[0], 0.5)] if start <= time < end else []),
    )
    words = told(seconds, lambda second: one[0] if start <= second < end else "empty")
    return Lesson(
        question=f"When is the {one[0]} {one[1]} there?",
        answer=f"{start}.0 to {end}.0 seconds",
        words=words,
        media=(clip,),
    )


def static(rng: random.Random, split: str, level: int) -> Lesson:
    """A long clip in which nothing moves, but a second thing comes once, for some seconds: its colour."""
    things = others(rng, 2)
    seconds = length(rng, split, 6 + 4 * level, 12 + 4 * level)
    start, empty = rng.randint(2, seconds - 4), even_canvas(rng)
    cells = rng.sample((0.25, 0.75), 2)
    still, coming = (shape(empty, one, x, 0.5) for one, x in zip(things, cells, strict=True))
    clip = filmed(empty, seconds, lambda time: [still, coming] if start <= time < start + 3 else [still])
    words = told(
        seconds, lambda second: f"{things[0][0]}{f' {things[1][0]}' * (start <= second < start + 3)}"
    )
    return Lesson(question="Which colour comes and goes?", answer=things[1][0], words=words, media=(clip,))
