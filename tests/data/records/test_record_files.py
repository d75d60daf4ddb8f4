"""Files of records are read as they are; what cannot be read has its place and its reason."""

from __future__ import annotations

import json
from collections import Counter

import pyarrow
import pytest

from tests.data.conftest import drawn_picture, picture_bytes
from tests.data.records.test_annotations import record
from vl3train.contracts.records import SampleError
from vl3train.data.prepare.annotated_records import AnnotatedRecords
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


def talk_of(source):
    """Answers and media of each record of a source."""
    found = []
    for where, row in read_annotations(source):
        conversation, files = read_record(row, where=where)
        found.append((conversation.turns[-1].content[0].text, files))
    return found


def test_no_clip_picture_or_sound_is_decoded_by_datasets_however_deep_it_lies(tmp_path):
    """It decodes clips by torchcodec, which is not installed with vl3train."""
    import datasets

    film, picture = b"film bytes", picture_bytes(drawn_picture(20, 30))
    parts = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
    turn = {"role": datasets.Value("string"), "content": datasets.List(parts)}
    features = datasets.Features(
        {"video": datasets.Video(), "audio": datasets.Audio(), "messages": datasets.List(turn)}
    )
    asked = [{"type": "image", "image": {"bytes": picture, "path": None}}, {"type": "text", "text": "What?"}]
    row = {
        "video": {"bytes": film, "path": "a.mp4"},
        "audio": {"bytes": b"sound", "path": "a.wav"},
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        ],
    }
    arrow = pyarrow.Table.from_pylist([row], schema=features.arrow_schema)
    table = datasets.Dataset(datasets.table.InMemoryTable(arrow))
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "splits")
    datasets.DatasetDict({"a": table, "b": table}).save_to_disk(tmp_path / "others")
    for name in ("a.parquet", "saved", "splits", "others/a"):
        ((answer, files),) = talk_of(str(tmp_path / name))
        assert (answer, {file.data for file in files}) == ("A cat.", {film, picture})
    ignored: Counter[str] = Counter()
    ((where, found),) = read_annotations(tmp_path / "saved")
    read_record(found, where=where, ignored=ignored)
    assert ignored == {"audio": 1}
    with pytest.raises(ValueError, match=r"no split `train`; name one of .*others/a"):
        list(read_annotations(tmp_path / "others"))


@pytest.mark.parametrize("form", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
@pytest.mark.parametrize("suffix", ["mp4", "png"])
def test_a_folder_of_clips_or_pictures_with_metadata(tmp_path, form, suffix):
    import datasets

    rows = [{"file_name": f"{number}.{suffix}", "question": "What?", "answer": "NA"} for number in range(2)]
    for row in rows:
        (tmp_path / row["file_name"]).write_bytes(picture_bytes(drawn_picture(20, 30)))
    if form.endswith("jsonl"):
        (tmp_path / form).write_text("\n".join(map(json.dumps, rows)))
    elif form.endswith("csv"):
        (tmp_path / form).write_text(
            "\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)])
        )
    else:
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / form)
    given = AnnotatedRecords((str(tmp_path),), (tmp_path / "elsewhere",))
    found = [content for _, content in given.read()]
    assert [conversation.turns[-1].content[0].text for conversation, _ in found] == ["NA", "NA"]
    assert [file.location.name for _, (file,) in found] == [row["file_name"] for row in rows]
    assert {file.kind for _, (file,) in found} == {"video" if suffix == "mp4" else "image"}


def test_a_folder_of_tables_is_read_as_text_too(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.csv").write_text("question,answer\nHow many?,007\nIs it?,NA\n")
    assert [answer for answer, _ in talk_of(str(tmp_path / "data"))] == ["007", "NA"]


def test_columns_that_are_not_named_keep_their_names(tmp_path):
    (tmp_path / "a.csv").write_text("image,q,a,system,note\nx.jpg,What?,A cat.,Be kind.,n\n")
    columns = {"q": "user", "a": "assistant"}
    ((_, row),) = read_annotations(tmp_path / "a.csv", columns)
    ignored: Counter[str] = Counter()
    conversation, files = read_record(row, where="", ignored=ignored)
    assert files == (MediaFile("x.jpg", "image"),)
    assert [turn.role for turn in conversation.turns] == ["system", "user", "assistant"]
    assert ignored == {"note": 1}
    ((_, row),) = read_annotations(tmp_path / "a.csv", {**columns, "image": "ignore"})
    assert read_record(row, where="")[1] == ()


@pytest.mark.parametrize(
    ("files", "has"),
    [
        ([], "it is empty"),
        (["a.bin", "b.foo"], "it has a.bin, b.foo. Name the file of records"),
        (["in/it/c.xyz"], "it has in/. Name the file of records"),
    ],
)
def test_a_folder_without_records_says_what_it_has(tmp_path, files, has):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    with pytest.raises(ValueError, match="is a folder without records: annotations") as error:
        list(read_annotations(folder))
    assert str(error.value).endswith(has)
