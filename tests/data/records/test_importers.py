"""Golden records of published forms, read to conversations; what has another form is told."""

from __future__ import annotations

import doctest
import json

import datasets
import pytest

from tests.data.faults_fixture import clip, jpeg
from vl3train.contracts.records import SampleError
from vl3train.data.prepare.annotated_records import AnnotatedRecords
from vl3train.data.prepare.write_shards import write_shards
from vl3train.data.records import importers
from vl3train.data.records.annotations import read_record
from vl3train.data.records.conversation import Conversation, Image, Text, Turn, Video
from vl3train.data.records.record_files import read_annotations


def talk(*turns):
    both = [(Turn("user", question), Turn("assistant", (Text(reply),))) for question, reply in turns]
    return Conversation(tuple(turn for pair in both for turn in pair))


FACTS = {"content_metadata": {"description": "A walk.", "qAndA": [{"question": "Who?", "answer": "Ann."}]}}
TEXTS = [{"user": "What?", "assistant": "Cats.", "source": "x"}, {"user": "Why?", "assistant": "So."}]
GOLDEN = {
    "caption": (
        {"image_path": "a.jpg", "text": "A cat.", "width": 3},
        talk(((Image("0.jpg"),), "A cat.")),
    ),
    "question": (
        {"image": "a.png", "query": "How many?", "label": ["3", "three"], "human_or_machine": 1},
        talk(((Image("0.png"), Text("How many?")), "3")),
    ),
    "cauldron": (
        {"images": ["a.png", "b.jpg"], "texts": TEXTS},
        talk(((Image("0.png"), Image("1.jpg"), Text("What?")), "Cats."), ((Text("Why?"),), "So.")),
    ),
    "synthdog": (
        {"image": "a.jpg", "ground_truth": json.dumps({"gt_parse": {"text_sequence": "Hello"}})},
        talk(((Image("0.jpg"),), "Hello")),
    ),
    "finevideo": (
        {"mp4": "a.mp4", "json": FACTS},
        talk(((Video("0.mp4"), Text("Describe the video.")), "A walk."), ((Text("Who?"),), "Ann.")),
    ),
    "charades": (
        {"id": "46GP8", "descriptions": "He cooks; ", "question": "Where?", "answer": "Here.", "length": 3.5},
        talk(((Video("0.mp4"), Text("Describe the video.")), "He cooks"), ((Text("Where?"),), "Here.")),
    ),
    "moments": (
        {
            "id": "v_1",
            "duration": 9,
            "timestamps": [[0, 1.26], [2, 9]],
            "sentences": ["He runs.", " He falls."],
        },
        talk(
            ((Video("0.mp4"), Text("When does this happen: He runs.")), "0.0-1.3 s"),
            ((Text("When does this happen: He falls."),), "2.0-9.0 s"),
        ),
    ),
}


def test_every_importer_has_a_golden_record():
    assert set(GOLDEN) == set(importers.IMPORTERS)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(tmp_path, name):
    record, expected = GOLDEN[name]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record) + "\n" + json.dumps({"other": 1}) + "\n[1]\n")
    (_, good), *strange = read_annotations(f"{name}:{path}")
    assert read_record(good, where="w")[0] == expected
    assert len(strange) == 2
    for _, bad in strange:
        assert isinstance(bad, SampleError)
        assert f"no {name} record" in str(bad)


def test_a_time_that_is_no_float_is_told(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"video": "a.mp4", "timestamps": [[0, 10**400]], "sentences": ["He runs."]}))
    [(_, bad)] = read_annotations(f"moments:{path}")
    assert "no moments record: OverflowError" in str(bad)


def test_parquet_with_bytes_of_pictures_and_clips_becomes_shards(tmp_path):
    captions = [
        {"image": {"bytes": jpeg(number), "path": None}, "caption": f"Number {number}."}
        for number in range(3)
    ]
    datasets.Dataset.from_list(captions).to_parquet(tmp_path / "caption.parquet")
    films = [{"mp4": clip(tmp_path), "json": json.dumps(FACTS)}]
    datasets.Dataset.from_list(films).to_parquet(tmp_path / "film.parquet")
    report = write_shards(
        AnnotatedRecords(
            (f"caption:{tmp_path}/caption.parquet", f"finevideo:{tmp_path}/film.parquet"), (tmp_path,)
        ),
        tmp_path / "out",
        max_samples=10,
        max_bytes=10**9,
        skip_rejected=False,
        progress=lambda what, count: None,
    )
    assert (report.num_written, report.rejected) == (4, ())


def test_examples_in_the_docstrings_hold():
    assert doctest.testmod(importers).failed == 0


def test_a_csv_and_a_folder_of_clips_become_shards(tmp_path):
    """As Charades-STA comes: several rows, each with a sentence and its times, of one clip; commas in quotes."""
    (tmp_path / "clips").mkdir()
    for name in ("AO8RW", "0BX9N"):
        (tmp_path / "clips" / f"{name}.mp4").write_bytes(clip(tmp_path))
    rows = ["id,start,end,sentence", 'AO8RW,0.0,6.9,"a person, at home, reads."', "AO8RW,3,4.25,he sits."]
    (tmp_path / "sta.csv").write_text("\n".join([*rows, "0BX9N,1,2,she runs.", "GONE1,1,2,nobody runs.\n"]))
    report = write_shards(
        AnnotatedRecords((f"charades:{tmp_path}/sta.csv",), (tmp_path / "clips",)),
        tmp_path / "out",
        max_samples=10,
        max_bytes=10**9,
        skip_rejected=True,
        progress=lambda what, count: None,
    )
    assert report.num_written == 3
    ((where, reason),) = [(one.where, one.reason) for one in report.rejected]
    assert where.endswith("sta.csv[3]")
    assert "no such file" in reason
    assert "GONE1.mp4" in reason
