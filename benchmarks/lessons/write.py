"""Writes the tasks as webdataset shards, many at a time, and the recipes of the stages."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from benchmarks.lessons.lesson import HELD_OUT_SPLITS, Lesson, Page, encoded
from benchmarks.lessons.tasks import TASKS, lesson
from vl3train.contracts.files import write_whole
from vl3train.contracts.strict_json import json_text
from vl3train.data.prepare.write_shards import write_members
from vl3train.data.records.conversation import Content, Conversation, Image, Text, Turn, Video
from vl3train.demo.clips import SOURCE_FPS, Clip
from vl3train.demo.scenes import Scene

SAMPLES_A_SHARD = 250
WORTH_PROCESSES = 2000
"""Samples from which processes, which take seconds to start, are worth it."""
SQUARE = 112
"""Side of a picture in the change ``square``, in pixels."""
CHANGES = ("", "square", "no_times", "shuffled_images", "blank_images", "shuffled_answers")
"""How samples differ from what the task drew; the first: not at all. variants.py says what each is for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One shard to write: samples from ``first`` on."""

    path: Path
    task: str
    split: str
    change: str
    seed: int
    first: int
    size: int


def write_data(
    out: Path, counts: Mapping[str, int], seed: int, change: str = "", tasks: Sequence[str] = tuple(TASKS)
) -> int:
    """Write ``counts[split]`` samples of each task into ``out/TASK-SPLIT``; returns the number of samples.

    A change has folders of its own, ``out/TASK-SPLIT-CHANGE``. Folders that are there are not written again.
    """
    shards: list[Shard] = []
    for task, split in product(tasks, counts):
        folder = out / f"{task}-{split}{f'-{change}' if change else ''}"
        if folder.is_dir():
            continue
        folder.mkdir(parents=True)
        for number, first in enumerate(range(0, counts[split], SAMPLES_A_SHARD)):
            size = min(SAMPLES_A_SHARD, counts[split] - first)
            path = folder / f"shard-{number:06d}.tar"
            shards.append(
                Shard(path=path, task=task, split=split, change=change, seed=seed, first=first, size=size)
            )
    shards.sort(key=lambda shard: TASKS[shard.task].kind != "clip")  # the slow ones first
    processes = min(len(shards), len(os.sched_getaffinity(0)))
    if processes <= 1 or sum(shard.size for shard in shards) < WORTH_PROCESSES:
        return sum(map(write_shard, shards))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return sum(pool.map(write_shard, shards))


def write_shard(shard: Shard) -> int:
    """Write one shard; returns its number of samples."""
    write_members(shard.path, (member(shard, shard.first + i) for i in range(shard.size)))
    return shard.size


def member(shard: Shard, number: int) -> tuple[str, dict[str, bytes]]:
    """Key and parts of one sample in a shard."""
    one = changed(shard, lesson(shard.task, shard.split, shard.seed, number), number)
    asked: list[Content] = []
    parts: dict[str, bytes] = {}
    for place, medium in enumerate(one.media):
        suffix, content = encoded(medium, SQUARE if shard.change == "square" else None)
        parts[f"{place}.{suffix}"] = content
        asked.append((Video if suffix == "mp4" else Image)(f"{place}.{suffix}"))
    asked.append(Text(one.question))
    turns = (Turn("user", tuple(asked)), Turn("assistant", (Text(one.answer),)))
    return f"{number:07d}", {"json": Conversation(turns).to_json(), **parts}


def changed(shard: Shard, one: Lesson, number: int) -> Lesson:
    """``one`` as the shard's change has it. Another sample is that of the same level in a fixed distance."""
    if shard.change in ("shuffled_images", "shuffled_answers"):
        other = lesson(shard.task, shard.split, shard.seed, number + 3 * 1_000_003)
        which = {"media": other.media} if shard.change == "shuffled_images" else {"answer": other.answer}
        return dataclasses.replace(one, **which)  # type: ignore[arg-type]
    if shard.change == "blank_images":
        return dataclasses.replace(one, media=tuple(blank(medium) for medium in one.media))
    if shard.change == "no_times":
        return dataclasses.replace(
            one, media=tuple(still for medium in one.media for still in stills(medium))
        )
    return one


def blank(medium: Scene | Page | Clip) -> Scene | Clip:
    """A medium of the same size in which nothing is seen."""
    if isinstance(medium, Clip):
        return Clip(frames=tuple(blank_scene(frame) for frame in medium.frames))
    return blank_scene(medium)


def blank_scene(scene: Scene | Page) -> Scene:
    """An empty picture of the same size."""
    return Scene(width=scene.width, height=scene.height, ground=(128, 128, 128))


def stills(medium: Scene | Page | Clip) -> Sequence[Scene | Page]:
    """The frames that training samples of a clip, as pictures."""
    return medium.frames[::SOURCE_FPS] if isinstance(medium, Clip) else (medium,)


def write_recipe(file: Path, weights: Mapping[str, float], folders: Callable[[str, str], str]) -> None:
    """A recipe that trains tasks with the given weights, and asks the held-out questions of all tasks."""
    sources: list[dict[str, object]] = []
    for task, split in product(TASKS, HELD_OUT_SPLITS):
        source: dict[str, object] = {"name": f"{task}-{split}", "held_out": folders(task, split)}
        source["metrics"] = [TASKS[task].metric]
        if split == HELD_OUT_SPLITS[0] and weights.get(task):
            source |= {"shards": folders(task, "train"), "weight": weights[task]}
        sources.append(source)
    content = {"name": file.stem, "about": "Drawn by benchmarks/learning.py.", "sources": sources}
    write_whole(file, json_text(content))
