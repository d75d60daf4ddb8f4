"""The tasks by name: how each is drawn and scored, and which stage trains how much of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.lessons import clips, pages, shapes
from benchmarks.lessons.lesson import Lesson

LEVELS = (1, 2, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task. ``weights`` are its shares in the stages that train it."""

    draw: Callable[[random.Random, str, int], Lesson]
    kind: str  # image, clip or text
    weights: Mapping[int, float]
    new: str  # what the split `new` draws that training does not
    aim: float | None = None
    metric: str = "exact"


COMBINATIONS = "colours of shapes that training never shows"
WIDE = "other sizes and aspect ratios"
LONGER = "clips up to half longer than any in training"
IMAGES, CLIPS = {2: 1.0, 3: 1.0, 4: 0.5}, {3: 1.0, 4: 1.5}

TASKS: dict[str, Task] = {
    "captions": Task(draw=shapes.caption, kind="image", weights={1: 2.0, 2: 1.0}, new=COMBINATIONS),
    "attributes": Task(draw=shapes.attributes, kind="image", weights=IMAGES, new=COMBINATIONS, aim=0.95),
    "counting": Task(draw=shapes.counting, kind="image", weights=IMAGES, new=WIDE, aim=0.95),
    "relations": Task(draw=shapes.relations, kind="image", weights=IMAGES, new=COMBINATIONS),
    "reading": Task(
        draw=pages.reading, kind="image", weights={1: 2.0, **IMAGES}, new="words never shown", aim=0.9
    ),
    "chart": Task(draw=pages.chart, kind="image", weights=IMAGES, new=WIDE),
    "document": Task(draw=pages.document, kind="image", weights=IMAGES, new="lines never shown"),
    "comparison": Task(draw=shapes.comparison, kind="image", weights={3: 1.0, 4: 0.5}, new=COMBINATIONS),
    "text": Task(
        draw=pages.text_only, kind="text", weights={2: 0.5, 3: 0.5, 4: 0.5}, new="pairs never shown"
    ),
    "direction": Task(draw=clips.direction, kind="clip", weights=CLIPS, new=COMBINATIONS, aim=0.95),
    "speed": Task(draw=clips.speed, kind="clip", weights=CLIPS, new=COMBINATIONS),
    "order": Task(draw=clips.order, kind="clip", weights=CLIPS, new=LONGER, aim=0.9),
    "events": Task(draw=clips.events, kind="clip", weights=CLIPS, new=LONGER),
    "grounding": Task(
        draw=clips.grounding, kind="clip", weights=CLIPS, new=LONGER, aim=0.8, metric="temporal_iou"
    ),
    "static": Task(draw=clips.static, kind="clip", weights=CLIPS, new=LONGER),
}


def lesson(task: str, split: str, seed: int, number: int) -> Lesson:
    """Sample ``number`` of a split: the same for the same arguments on every machine. Levels take turns."""
    rng = random.Random(f"{seed}/{task}/{split}/{number}")
    return TASKS[task].draw(rng, split, LEVELS[number % len(LEVELS)])
