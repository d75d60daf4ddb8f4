"""Text is read as text: tables guess nothing, compressed files are read as they are, damage has its reason."""

from __future__ import annotations

import bz2
import doctest
import gzip
import json
import lzma

import pyarrow
import pytest

from vl3train.contracts.records import SampleError
from vl3train.data.records import json_dictionaries, text_files
from vl3train.data.records.annotations import read_record
from vl3train.data.records.record_files import read_annotations, source_problems


def rows(path, *others):
    return [row for _, row in read_annotations(path, None, [str(other) for other in others])]


@pytest.mark.parametrize("module", [text_files, json_dictionaries])
def test_examples_in_the_docstrings_hold(module):
    assert doctest.testmod(module).failed == 0


def test_a_table_is_read_as_text(tmp_path):
    (tmp_path / "a.csv").write_text(
        '\ufeffimage,question,answer\na.jpg,How many?,3\na.jpg,Is it?,True\n"b, c.jpg",Which?,NA\n'
        'a.jpg,"Who,\nthen?",None\n\na.jpg,Number?,007\n,None?,1.50\n'
    )
    found = [(row["image"], row["question"], row["answer"]) for row in rows(tmp_path / "a.csv")]
    assert [answer for *_, answer in found] == ["3", "True", "NA", "None", "007", "1.50"]
    assert found[2][0] == "b, c.jpg"
    assert found[3][1] == "Who,\nthen?"
    assert read_record(rows(tmp_path / "a.csv")[0], where="")[0].turns[1].content[0].text == "3"
    (tmp_path / "a.tsv").write_text("q\ta\nx, y\t3\n")
    (tmp_path / "b.csv").write_text("q;a\nx, y;3\n")
    assert rows(tmp_path / "a.tsv") == rows(tmp_path / "b.csv") == [{"q": "x, y", "a": "3"}]


def test_rows_that_are_none_have_their_place_and_reason(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"q,a\nx,y,z\nx\nb,c\xff\nd,e\n")
    found = list(read_annotations(tmp_path / "a.csv"))
    assert [where.rpartition("[")[2] for where, _ in found] == ["0]", "1]", "2]", "3]"]
    assert [str(row) for _, row in found[:2]] == [
        f"{count} cells for 2 columns ['q', 'a']; a cell with a comma or a line end needs quotes"
        for count in (3, 1)
    ]
    assert "'a' is no UTF-8 text" in str(found[2][1])
    assert found[3][1] == {"q": "d", "a": "e"}
    (tmp_path / "b.csv").write_text("q,q\n1,2\n")
    assert "columns of the same name: ['q']" in str(rows(tmp_path / "b.csv")[0])


def zst(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zst)]
)
def test_compressed_files_are_read_and_damaged_ones_have_a_reason(tmp_path, suffix, pack):
    records = [{"a": number, "b": "x" * 50} for number in range(2000)]
    lines = "\n".join(map(json.dumps, records)).encode()
    contents = {"a.jsonl": lines, "b.ndjson": lines, "c.json": json.dumps(records).encode()}
    for name, content in contents.items():
        path = tmp_path / f"{name}.{suffix}"
        path.write_bytes(pack(content))
        assert source_problems([str(path)]) == []
        assert rows(path) == records
        path.write_bytes(pack(content)[:-40])
        assert isinstance(rows(path)[-1], SampleError)
    (tmp_path / f"d.csv.{suffix}").write_bytes(pack(b"q,a\nx,NA\n"))
    assert rows(tmp_path / f"d.csv.{suffix}") == [{"q": "x", "a": "NA"}]


COCO = {
    "info": {"year": 2017},
    "images": [{"id": 9, "file_name": "000000000009.jpg", "width": 4}],
    "annotations": [
        {"image_id": 9, "id": 1, "caption": "A cat."},
        {"image_id": 9, "id": 2, "caption": "Cats."},
    ],
}
QUESTIONS = {
    "data_subtype": "train2014",
    "questions": [
        {"image_id": 9, "question": "What is it?", "question_id": 90},
        {"image_id": 9, "question": "How many?", "question_id": 91},
    ],
}
ANSWERS = {
    "annotations": [
        {"question_id": 91, "image_id": 9, "answers": [{"answer": word} for word in ("2", "3", "3")]},
        {"question_id": 90, "image_id": 9, "multiple_choice_answer": "cat", "answers": [{"answer": "dog"}]},
    ]
}


def save(path, value):
    path.write_text(json.dumps(value))
    return path


def test_captions_of_coco_are_read(tmp_path):
    found = rows(save(tmp_path / "captions.json", COCO))
    assert found == [{"image": "000000000009.jpg", "caption": caption} for caption in ("A cat.", "Cats.")]
    assert [read_record(row, where="")[0].turns[1].content[0].text for row in found] == ["A cat.", "Cats."]
    boxes = {**COCO, "annotations": [{"image_id": 9, "bbox": [1, 2, 3, 4]}, {"image_id": 8, "caption": "x"}]}
    reasons = list(map(str, rows(save(tmp_path / "boxes.json", boxes))))
    assert "without `caption`" in reasons[0]
    assert "no file_name of image_id=8" in reasons[1]


def test_questions_find_their_answers_in_the_file_named_with_them(tmp_path):
    questions, answers = save(tmp_path / "q.json", QUESTIONS), save(tmp_path / "a.json", ANSWERS)
    image = "COCO_train2014_000000000009.jpg"
    expected = [
        {"image": image, "question": "What is it?", "answer": "cat"},
        {"image": image, "question": "How many?", "answer": "3"},
    ]
    assert rows(questions, questions, answers) == expected
    assert rows(answers, questions, answers) == []
    assert rows(save(tmp_path / "one.json", {**QUESTIONS, **ANSWERS})) == expected
    for alone in (questions, answers):
        assert "vl3train shards QUESTIONS.json ANSWERS.json" in str(rows(alone, alone)[0])


@pytest.mark.parametrize(
    "whole", [{"version": 1, "data": [{"a": 1}, {"a": 2}]}, {"x": {"a": 1}, "y": {"a": 2}}]
)
def test_lists_under_a_name_and_records_by_name_are_read(tmp_path, whole):
    assert rows(save(tmp_path / "a.json", whole)) == [{"a": 1}, {"a": 2}]
