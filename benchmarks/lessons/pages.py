"""Tasks about text and charts, and tasks without a picture."""

from __future__ import annotations

import dataclasses
import random
import zlib

from benchmarks.lessons.lesson import Lesson, Page
from benchmarks.lessons.shapes import canvas
from vl3train.demo.scenes import COLOURS

CONSONANTS, VOWELS = "BDKLMNRST", "AEIOU"
SIZES = {1: (26, 30), 2: (18, 22), 3: (12, 14)}
"""Pixels of the letters, by level. A patch has 14."""
NAMES = ("Anna", "Ben", "Cora", "Dan", "Eva", "Finn", "Gina", "Hans")
OBJECTS = ("ball", "box", "cup", "hat", "door", "car", "book", "lamp")


def is_new(text: str) -> bool:
    """Whether only the split ``new`` has this text: one text in five."""
    return zlib.crc32(text.encode()) % 5 == 0


def word(rng: random.Random, split: str, letters: int) -> str:
    """A word of three or four letters, consonants and vowels in turn, as BAKO."""
    while True:
        found = "".join(rng.choice(VOWELS if i % 2 else CONSONANTS) for i in range(letters))
        if is_new(found) == (split == "new"):
            return found


def reading(rng: random.Random, split: str, level: int) -> Lesson:
    """A word, whose letters are smaller at each level."""
    text = word(rng, split, rng.choice((3, 4)))
    size = rng.randint(*SIZES[level])
    page = Page(
        width=112,
        height=rng.randint(56, 84),
        lines=(text,),
        size=size,
        left=rng.randint(4, max(5, 106 - len(text) * size)),
        top=rng.randint(2, 50 - size),
    )
    answer = " ".join(text)
    return Lesson(
        question="Spell the word.", answer=answer, words=f"The word {text}: {answer}.", media=(page,)
    )


def document(rng: random.Random, split: str, level: int) -> Lesson:
    """Lines of a name and a number, two more at each level: the number of one name."""
    lines = []
    names = rng.sample(NAMES, 1 + 2 * level)
    asked = rng.choice(names)
    for name in names:
        while True:
            number = rng.randint(10, 99)
            if is_new(f"{name} {number}") == (split == "new" and name == asked):
                break
        lines.append(f"{name} {number}")
    answer = next(line for line in lines if line.startswith(asked)).split()[1]
    height = int(len(lines) * 16 * 1.35) + 10
    page = Page(width=112, height=height, lines=tuple(lines), size=16, left=rng.randint(4, 20))
    return Lesson(
        question=f"Which number has {asked}?", answer=answer, words=", ".join(lines) + ".", media=(page,)
    )


def chart(rng: random.Random, split: str, level: int) -> Lesson:
    """The tallest or the lowest of two to four bars."""
    colours = rng.sample(list(COLOURS), level + 1)
    shares = [0.25 + 0.7 * step / level for step in range(level + 1)]
    rng.shuffle(shares)
    bars = tuple(zip(colours, shares, strict=True))
    superlative, pick = rng.choice((("tallest", max), ("lowest", min)))
    answer = colours[shares.index(pick(shares))]
    shown = dataclasses.replace(canvas(rng, wide=split == "new"), bars=bars)
    words = ", ".join(f"a {colour} bar of {round(share * 100)}" for colour, share in bars) + "."
    return Lesson(
        question=f"Which colour is the {superlative} bar?", answer=answer, words=words, media=(shown,)
    )


def text_only(rng: random.Random, split: str, level: int) -> Lesson:
    """Who has what, of a list in the question; two more people at each level."""
    names = rng.sample(NAMES, 2 * level)
    asked = rng.choice(names)
    pairs = {}
    for name in names:
        while True:
            owned = f"{rng.choice(list(COLOURS))} {rng.choice(OBJECTS)}"
            if is_new(f"{name} {owned}") == (split == "new" and name == asked):
                break
        pairs[name] = owned
    listed = " ".join(f"{name} has a {owned}." for name, owned in pairs.items())
    return Lesson(question=f"{listed} What has {asked}?", answer=pairs[asked])
