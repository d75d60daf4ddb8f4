"""Records become two sides that share no medium, in any form and from several files, and only once."""

from __future__ import annotations

import base64
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.finetuning.records import draw, make_records, record, write_jsonl
from vl3train.finetuning.data.samples import media_folders, read_records
from vl3train.finetuning.data.shards import made_from, make_data, recipe_text, split_records


def pictures_in(folder: Path) -> set[bytes]:
    found = set()
    for shard in folder.glob("*.tar"):
        with tarfile.open(shard) as tar:
            found |= {tar.extractfile(one).read() for one in tar if one.name.endswith("png")}  # type: ignore[union-attr]
    return found


def test_the_same_bytes_under_other_names_are_one_medium(tmp_path: Path):
    for number, name in enumerate(("a.png", "b.png")):
        draw(tmp_path / name, number)
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "link.png").symlink_to(tmp_path / "b.png")
    inline = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    names = ("a.png", "b.png", "copy.png", "link.png", f"data:image/png;base64,{inline}")
    file = write_jsonl(tmp_path / "my.jsonl", [record(name, "What?", "x") for name in names])
    media = [item.media for item in read_records([str(file)], media_roots=[str(tmp_path)])[0].items]
    assert media[0] == media[2] == media[4]
    assert media[1] == media[3] != media[0]


def test_several_files_of_other_forms_are_read_together(tmp_path: Path):
    file = make_records(tmp_path, 4)
    table = pa.table(
        {
            "image": [{"bytes": (tmp_path / "pictures/0.png").read_bytes(), "path": "0.png"}],
            "messages": [[{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}]],
        }
    )
    pq.write_table(table, tmp_path / "more.parquet")
    [records] = read_records([str(file), str(tmp_path / "more.parquet")], media_roots=[])
    assert (len(records.items), records.rejected) == (7, [])
    [first, *_, last] = records.items
    assert first.media == last.media


def test_both_sides_are_written_once_and_again_when_something_changed(tmp_path: Path):
    file = make_records(tmp_path, 9)
    split = split_records([str(file)], [str(tmp_path)], "25%")
    assert (split.num_training, split.num_held_out) == (9, 3)
    out = tmp_path / "data"
    assert make_data(split, out, lambda *_: None)
    train, held_out = pictures_in(out / "train"), pictures_in(out / "held_out")
    assert (len(train | held_out), train & held_out) == (9, set())
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    assert not make_data(split_records([str(file)], [str(tmp_path)], "25%"), out, lambda *_: None)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")} == before

    for changed in ("30%", "25%"):
        if changed == "25%":
            draw(tmp_path / "pictures/1.png", 40)
        other = split_records([str(file)], [str(tmp_path)], changed)
        assert other.digest != made_from(out)
        assert make_data(other, out, lambda *_: None)
    (out / "made_from.json").write_text("{")
    assert made_from(out) is None
    assert make_data(split, out, lambda *_: None), "what a killed command left is made anew"
    (out / "made_from.json").unlink()
    with pytest.raises(FileExistsError, match="not made from records"):
        make_data(split, out, lambda *_: None)
    assert pictures_in(out / "train"), "nothing of somebody's is deleted"
    assert "held_out: data/held_out" in recipe_text("mine", split, ["my.jsonl"])


def test_a_file_of_held_out_records_is_taken_and_what_it_shares_is_told(tmp_path: Path):
    file = make_records(tmp_path / "one", 3)
    other = make_records(tmp_path / "two", 5)
    split = split_records([str(file)], [], str(other))
    assert (split.num_training, split.num_held_out) == (4, 7)
    [remark] = split.remarks
    assert remark.startswith(f"4 samples of {other} show a picture or clip that is trained on too")
    assert split_records([str(file)], [], "0").held_out is None


def test_records_whose_media_hang_together_cannot_be_held_out(tmp_path: Path):
    make_records(tmp_path, 3)
    lines = [record("pictures/0.png", f"{i}?", str(i)) for i in range(20)]
    split = split_records([str(write_jsonl(tmp_path / "same.jsonl", lines))], [str(tmp_path)], "10%")
    assert (split.num_training, split.num_held_out) == (20, 0)
    assert split.remarks[0].startswith("0 samples are held out and not 2: the other samples share pictures")


def test_every_mistake_of_the_files_is_told(tmp_path: Path, monkeypatch):
    file = make_records(tmp_path, 2)
    lines = [record("pictures/9.png", "a", "b"), {"image": 3}]
    bad = write_jsonl(tmp_path / "bad.jsonl", lines)  # type: ignore[arg-type]
    write_jsonl(tmp_path / "more.jsonl", [{**record("pictures/0.png", "a", "b"), "note": "x"}])
    split = split_records([str(file), str(bad), str(tmp_path / "more.jsonl")], [], "0")
    assert (len(split.rejected), split.remarks) == (2, ("not read: note (1 records)",))
    with pytest.raises(ValueError, match=r"(?s)no.jsonl: no such file.*x.docx: no such file"):
        split_records([str(tmp_path / "no.jsonl"), str(tmp_path / "x.docx")], [], "5%")
    monkeypatch.chdir(tmp_path)
    assert media_folders(["sub/a.jsonl", "hf:org/name"], []) == (tmp_path, tmp_path / "sub")
    assert json.loads(file.read_text().splitlines()[0])["image"] == "pictures/0.png"
