"""Writes the demo's samples: first annotations and media as a user has them, then shards."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from vl3train.contracts.files import write_whole
from vl3train.contracts.strict_json import json_text
from vl3train.contracts.tokens import IMAGE_TAG, VIDEO_TAG
from vl3train.data.prepare.annotated_records import AnnotatedRecords
from vl3train.data.prepare.write_shards import write_shards
from vl3train.demo.clips import encode
from vl3train.demo.questions import TASKS, Question
from vl3train.demo.scenes import draw

NUM_TRAIN = {"captions": 2400}
"""Training samples of a source, where they are not ``NUM_TRAIN_DEFAULT``."""
NUM_TRAIN_DEFAULT = 800
NUM_HELD_OUT = 50
HELD_OUT_SUFFIX = "-held-out"
QUESTIONS_FILE = "questions.jsonl"
"""Held-out questions for ``vl3train generate --batch``; their media are in questions/ beside it."""
EXPECTED_FILE = "expected.jsonl"
"""For each line of ``QUESTIONS_FILE`` its source, key and right answer."""
NUM_QUESTIONS = 2
"""Questions of each source in that file."""
JPEG_SOURCES = ("colour", "shape")
"""Sources stored as JPEG; other pictures are PNG, so that both decoders are used."""


def draw_questions(source: str, seed: int, scale: float) -> tuple[list[Question], list[Question]]:
    """Training and held-out questions of one source; no two of them are the same."""
    rng = random.Random(f"{seed}/{source}")
    num_train = max(8, round(NUM_TRAIN.get(source, NUM_TRAIN_DEFAULT) * scale))
    num_held_out = max(4, round(NUM_HELD_OUT * scale))
    found: dict[Question, None] = {}
    while len(found) < num_held_out + num_train:
        found[TASKS[source](rng)] = None
    questions = list(found)
    return questions[num_held_out:], questions[:num_held_out]


def missing_folders(out: Path) -> list[str]:
    """Names of the shard folders that do not exist yet, the slow ones first."""
    names = [source + suffix for source in reversed(TASKS) for suffix in ("", HELD_OUT_SUFFIX)]
    return [name for name in names if not (out / name).is_dir()]


def write_missing(
    out: Path, seed: int, scale: float, num_processes: int, progress: Callable[[str, int], None]
) -> None:
    """Write every folder that ``missing_folders`` names; ``progress(name, samples)`` after each."""
    # Spawned: a fork would copy the state of the progress bar's thread at any point of its work.
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(write_folder, out, name, seed, scale): name for name in missing_folders(out)}
        for job in as_completed(jobs):
            progress(jobs[job], job.result())


def write_folder(out: Path, name: str, seed: int, scale: float) -> int:
    """Write the shards of one source's split; returns the number of samples. The folder appears when complete."""
    source = name.removesuffix(HELD_OUT_SUFFIX)
    train, held_out = draw_questions(source, seed, scale)
    drawing = out / f".drawing-{name}"
    if drawing.exists():  # of a command that was stopped; only one process writes this name
        shutil.rmtree(drawing)
    drawing.mkdir(parents=True)
    records = list(write_media(drawing, name, held_out if name != source else train))
    annotations = drawing / "annotations.jsonl"
    annotations.write_text("".join(json_text(record) + "\n" for record in records), encoding="utf-8")
    report = write_shards(
        AnnotatedRecords((str(annotations),), (drawing,)),
        out / name,
        max_samples=500,
        max_bytes=64 * 2**20,
        skip_rejected=False,
        progress=lambda what, number: None,
    )
    shutil.rmtree(drawing)
    return report.num_written


def write_media(folder: Path, name: str, questions: list[Question]) -> Iterator[dict[str, Any]]:
    """Write each question's picture or clip into ``folder`` and yield its annotation.

    Media have annotations in LLaVA's form, text in OpenAI's ``messages``: the two forms that users have.
    """
    for number, question in enumerate(questions):
        key = f"{name}-{number:05d}"
        if question.picture is not None:
            suffix = "jpg" if question.task in JPEG_SOURCES else "png"
            file = f"{key}.{suffix}"
            draw(question.picture).save(folder / file, quality=92)  # PNG has no quality and ignores it
            yield {"id": key, "image": file, "conversations": turns(IMAGE_TAG, question)}
        elif question.clip is not None:
            file = f"{key}.mp4"
            (folder / file).write_bytes(encode(question.clip))
            yield {"id": key, "video": file, "conversations": turns(VIDEO_TAG, question)}
        else:
            messages = [
                {"role": "user", "content": question.question},
                {"role": "assistant", "content": question.answer},
            ]
            yield {"id": key, "messages": messages}


def turns(tag: str, question: Question) -> list[dict[str, str]]:
    """A question about one visual item, and its answer, as LLaVA writes them."""
    return [
        {"from": "human", "value": f"{tag}\n{question.question}"},
        {"from": "gpt", "value": question.answer},
    ]


def write_questions(out: Path, seed: int, scale: float) -> None:
    """Write some held-out questions of every source as files, which a user can look at and ask a model."""
    media = out / "questions"
    media.mkdir(exist_ok=True)
    requests: list[dict[str, str]] = []
    expected: list[dict[str, str]] = []
    for source in TASKS:
        if source == "captions":
            continue  # stages 3 and 4 do not train captions, so the final model is not asked for them
        questions = draw_questions(source, seed, scale)[1][:NUM_QUESTIONS]
        records = write_media(media, source, questions)
        for question, record in zip(questions, records, strict=True):
            request = {"prompt": question.question}
            request |= {kind: f"questions/{record[kind]}" for kind in ("image", "video") if kind in record}
            requests.append(request)
            expected.append({"source": source, "key": record["id"], "answer": question.answer})
    for name, lines in ((EXPECTED_FILE, expected), (QUESTIONS_FILE, requests)):
        write_whole(out / name, "".join(json_text(line) + "\n" for line in lines))
