"""The demo's shards, read back with plain webdataset."""

from __future__ import annotations

import io
import json
from pathlib import Path

import av
import pytest
import webdataset
from PIL import Image

from vl3train.demo.build import HELD_OUT_SUFFIX, draw_questions, write_folder, write_questions
from vl3train.demo.questions import TASKS

MEDIA = {"colour": "jpg", "count": "png", "when": "mp4", "text": None}


@pytest.mark.parametrize("source", TASKS)
def test_held_out_questions_are_never_trained_on(source: str) -> None:
    train, held_out = draw_questions(source, seed=0, scale=1.0)
    assert len(held_out) == 50
    assert len(set(train)) == len(train) >= 800
    assert not set(train) & set(held_out)


@pytest.mark.parametrize("source", MEDIA)
def test_webdataset_reads_question_answer_and_medium(source: str, tmp_path: Path) -> None:
    name = source + HELD_OUT_SUFFIX
    assert write_folder(tmp_path, name, seed=0, scale=0.1) == 5
    samples = list(
        webdataset.WebDataset(
            [str(shard) for shard in sorted((tmp_path / name).glob("*.tar"))], shardshuffle=False
        )
    )
    _, held_out = draw_questions(source, seed=0, scale=0.1)
    assert len(samples) == len(held_out) == 5
    for sample, question in zip(samples, held_out, strict=True):
        text = json.dumps(json.loads(sample["json"]), ensure_ascii=False)
        assert question.answer in text
        assert question.question in text
        suffix = MEDIA[source]
        if suffix in ("jpg", "png"):
            picture = Image.open(io.BytesIO(sample[f"0.{suffix}"]))
            assert picture.size == (question.picture.width, question.picture.height)
        elif suffix == "mp4":
            with av.open(io.BytesIO(sample["0.mp4"])) as container:
                assert sum(1 for _ in container.decode(video=0)) == len(question.clip.frames)
    assert not list(tmp_path.glob(".drawing*")), "nothing but shards is left behind"


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    shards = []
    for run in ("first", "second"):
        write_folder(tmp_path / run, "motion-held-out", seed=3, scale=0.1)
        shards.append((tmp_path / run / "motion-held-out" / "shard-000000.tar").read_bytes())
    assert shards[0] == shards[1]


def test_questions_for_generate_stand_beside_their_answers(tmp_path: Path) -> None:
    write_questions(tmp_path, seed=0, scale=0.1)
    requests, expected = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("questions.jsonl", "expected.jsonl")
    )
    assert len(requests) == len(expected) == 2 * (len(TASKS) - 1)
    assert {line["source"] for line in expected} == set(TASKS) - {"captions"}, (
        "stages 3 and 4 train no captions"
    )
    for request in requests:
        assert set(request) <= {"prompt", "image", "video"}
        for kind in ("image", "video"):
            if kind in request:
                assert (tmp_path / request[kind]).is_file()
