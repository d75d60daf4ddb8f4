"""Small real records: pictures of one colour each, with a question or two about them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


def draw(file: Path, number: int) -> None:
    """A square of one colour somewhere on white; every number has a picture of its own."""
    pixels = np.full((42, 42, 3), 255, np.uint8)
    pixels[number % 20 : number % 20 + 20, 3:23] = list(COLOURS.values())[number % 3]
    pixels[0, number % 42] = 0
    Image.fromarray(pixels).save(file)


def record(file: str, question: str, answer: str) -> dict[str, object]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"image": file, "conversations": turns}


def make_records(folder: Path, pictures: int) -> Path:
    """``folder/my.jsonl`` and ``folder/pictures``; every third picture has two questions."""
    (folder / "pictures").mkdir(parents=True)
    lines = []
    for number in range(pictures):
        name = f"pictures/{number}.png"
        draw(folder / name, number)
        colour = list(COLOURS)[number % 3]
        lines.append(record(name, "What color is it?", colour))
        if number % 3 == 0:
            lines.append(record(name, "Is it red?", "yes"))
    return write_jsonl(folder / "my.jsonl", lines)


def write_jsonl(file: Path, lines: list[dict[str, object]]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file
