"""Files of records are read as they are; what cannot be read has its place and its reason."""

from __future__ import annotations

import json

import pytest

from tests.data.conftest import drawn_picture, picture_bytes
from tests.data.records.test_annotations import record
from vl3train.contracts.records import SampleError
from vl3train.data.records.annotations import read_record
from vl3train.data.records.conversation import Image, Text
from vl3train.data.records.media_files import MediaFile
from vl3train.data.records.record_files import read_annotations, source_problems


def test_json_and_jsonl_with_mixed_types(tmp_path):
    records = [record("a", "b", image="x.jpg"), record("a", "b", image=["x.jpg", "y.jpg"]), record("a", "b")]
    records[1]["id"] = "text"  # mixed types break datasets.load_dataset("json"), upstream's reader
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    assert [row for _, row in read_annotations(tmp_path / "a.json")] == records
    found = list(read_annotations(tmp_path / "a.jsonl"))
    assert [row for _, row in found] == records
    assert [where.rpartition(":")[2] for where, _ in found] == ["1", "3", "5"]


def test_what_cannot_be_read_comes_as_its_reason_and_stops_nothing(tmp_path):
    lines = [b'{"a": 1}', b'{"a" 1}', b'"caf\xe9"', b'{"a": 2}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (_, first), (second, broken), (third, strange), (_, last) = read_annotations(tmp_path / "a.jsonl")
    assert (first, last) == ({"a": 1}, {"a": 2})
    assert second.endswith("a.jsonl:2")
    assert str(broken).startswith("no JSON, line 1 column 6")
    assert third.endswith("a.jsonl:3")
    assert str(strange) == "no UTF-8 text, byte 4: invalid continuation byte"
    (tmp_path / "a.json").write_text('[\n{"a": 1},\n{"a" 2}]')
    ((_, whole),) = read_annotations(tmp_path / "a.json")
    assert "line 3" in str(whole)
    (tmp_path / "b.json").write_text("{}")
    ((_, no_list),) = read_annotations(tmp_path / "b.json")
    assert "no list" in str(no_list)
    assert {type(one) for one in (broken, strange, whole, no_list)} == {SampleError}


def test_all_missing_files_are_named_with_the_way_out(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    sources = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.parquet")]
    missing = source_problems(
        [*sources, f"caption:{tmp_path / 'd.csv'}", "hf:some/set", "caption:hf:some/set"]
    )
    assert [line.partition(":")[0] for line in missing] == [*sources[1:], str(tmp_path / "d.csv")]
    assert all("hf:NAME" in line for line in missing)
    with pytest.raises(ValueError, match=r"b\.jsonl: no such file"):
        next(read_annotations(sources[1]))


def test_files_of_another_kind_are_named_and_not_asked_for_on_the_hub(tmp_path):
    for name in ("a.xlsx", "b.json.zip", "c.txt"):
        (tmp_path / name).write_text("{}\n")
    problems = source_problems([*(str(tmp_path / name) for name in ("a.xlsx", "b.json.zip", "c.txt")), "hf:"])
    assert len(problems) == 4
    assert all("one record a line" in problem for problem in problems)


def test_suffixes_may_be_capitals(tmp_path):
    (tmp_path / "a.JSONL").write_text('{"a": 1}\n')
    assert [row for _, row in read_annotations(tmp_path / "a.JSONL")] == [{"a": 1}]


def test_json_that_python_does_not_read_comes_as_its_reason(tmp_path):
    (tmp_path / "a.jsonl").write_text("[" * 200_000 + "\n" + "1" * 6000 + '\n{"a": 1}\n')
    (_, deep), (_, long), (_, good) = read_annotations(tmp_path / "a.jsonl")
    assert type(deep) is type(long) is SampleError
    assert good == {"a": 1}
    (tmp_path / "lines.json").write_text('{"a": 1}\n{"a": 2}\n')
    ((_, lines),) = read_annotations(tmp_path / "lines.json")
    assert "one record a line is called .jsonl" in str(lines)


def test_a_damaged_table_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"nope")
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read"):
        list(read_annotations(tmp_path / "a.parquet"))


def test_csv_with_column_mapping(tmp_path):
    (tmp_path / "a.csv").write_text("img,q,a\nx.jpg,What?,A cat.\ny.jpg,Where?,Here.\n")
    columns = {"img": "image", "q": "user", "a": "assistant"}
    found = list(read_annotations(tmp_path / "a.csv", columns))
    assert len(found) == 2
    conversation, files = read_record(found[1][1], where=found[1][0])
    assert files == (MediaFile("y.jpg", "image"),)
    assert conversation.turns[0].content == (Image("0.jpg"), Text("Where?"))
    with pytest.raises(ValueError, match="known meanings"):
        next(read_annotations(tmp_path / "a.csv", {"q": "question"}))
    refused = [row for _, row in read_annotations(tmp_path / "a.csv", {"Q": "user"})]
    assert len(refused) == 2
    assert all("no column ['Q']; there are ['a', 'img', 'q']" in str(row) for row in refused)


@pytest.mark.parametrize("several", [False, True])
def test_parquet_with_pictures_inside(tmp_path, several):
    import datasets

    data = [picture_bytes(drawn_picture(20, 30, seed)) for seed in range(2)]
    cells = [{"bytes": one, "path": None} for one in data]
    feature = datasets.List(datasets.Image()) if several else datasets.Image()
    features = datasets.Features(
        {"image": feature, "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    table = {
        "image": [[cells[0], cells[1]], [cells[1]]] if several else cells,
        "question": ["What?", "Where?"],
        "answer": ["A.", "B."],
    }
    datasets.Dataset.from_dict(table, features=features).to_parquet(str(tmp_path / "a.parquet"))
    columns = {"image": "image", "question": "user", "answer": "assistant"}
    (where, row), _ = read_annotations(tmp_path / "a.parquet", columns)
    conversation, files = read_record(row, where=where)
    assert [file.data for file in files] == (data if several else data[:1])
    assert conversation.turns[0].content[0] == Image("0.png")
