"""What is written is what plain webdataset reads; no record is lost without being named."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import pytest
import webdataset

from vl3train.data.prepare import rejections
from vl3train.data.prepare import write_shards as prepare_write_shards
from vl3train.data.prepare.annotated_records import AnnotatedRecords
from vl3train.data.prepare.rejections import RejectedRecordsError
from vl3train.data.prepare.write_shards import write_shards
from vl3train.data.shards.tar_headers import shard_samples


def answer(text="yes", **keys):
    question = "<image>\nq" if "image" in keys else "q"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": text}]
    return {**keys, "conversations": turns}


@pytest.fixture
def media(tmp_path: Path) -> Path:
    root = tmp_path / "media"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "v1.5_a.JPG").write_bytes(b"jpeg bytes" * 100)
    (root / "b.png").write_bytes(b"png bytes")
    (root / "empty.png").write_bytes(b"")
    return root


def write(tmp_path, records, media, columns=None, **changes):
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = {"max_samples": 3, "max_bytes": 10**9, "skip_rejected": False}
    return write_shards(
        AnnotatedRecords((str(file),), (media,), columns),
        tmp_path / "out",
        progress=lambda what, count: None,
        **(options | changes),
    )


def test_doctests():
    for module in (prepare_write_shards, rejections):
        assert doctest.testmod(module).failed == 0


def test_plain_webdataset_reads_what_was_written(tmp_path, media):
    records = [answer(str(i), image="sub/v1.5_a.JPG" if i % 2 else "b.png") for i in range(7)]
    report = write(tmp_path, records, media)
    assert (report.num_written, report.num_shards, report.rejected) == (7, 3, ())
    tars = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
    assert len(samples) == 7
    for i, sample in enumerate(samples):
        part, name = ("0.jpg", "sub/v1.5_a.JPG") if i % 2 else ("0.png", "b.png")
        assert sample[part] == (media / name).read_bytes()
        turns = json.loads(sample["json"])["turns"]
        assert turns[0]["content"][0]["part"] == part
        assert turns[1]["content"][0]["text"] == str(i)
    ours = [sample for tar in tars for sample in shard_samples(Path(tar))]
    assert [sample.key for sample in ours] == [sample["__key__"] for sample in samples]
    assert all(sample.rejection is None for sample in ours)


def test_paths_that_cannot_be_are_problems_of_their_records(tmp_path, media):
    bad = [answer(image=path) for path in ("A" * 5000, "a\0.png", ".", "b.png/c.png")]
    with pytest.raises(RejectedRecordsError, match="4 of 4 records"):
        write(tmp_path, bad, media)


def test_a_link_to_an_empty_folder_is_filled_and_stays_a_link(tmp_path, media):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    assert write(tmp_path, [answer(image="b.png")], media).num_written == 1
    assert (tmp_path / "out").is_symlink()
    assert list((tmp_path / "disk").glob("*.tar"))


def test_the_folder_one_is_in_is_not_replaced(tmp_path, media, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(ValueError, match="name another"):
        write(tmp_path, [answer(image="b.png")], media)


def test_the_same_input_gives_the_same_bytes(tmp_path, media):
    records = [answer(str(i)) for i in range(5)]
    write(tmp_path, records, media)
    first = [path.read_bytes() for path in sorted((tmp_path / "out").iterdir())]
    (tmp_path / "out").rename(tmp_path / "before")
    write(tmp_path, records, media)
    assert [path.read_bytes() for path in sorted((tmp_path / "out").iterdir())] == first


def test_a_shard_closes_when_it_is_large(tmp_path, media):
    records = [answer("x", image="sub/v1.5_a.JPG")] * 4
    assert write(tmp_path, records, media, max_samples=100, max_bytes=1500).num_shards == 2


BAD = [
    answer("no file", image="nowhere.jpg"),
    answer("nor this", image="nor/here.jpg"),
    answer("empty", image="empty.png"),
    {"conversations": []},
    ["a list"],
]


def test_all_problems_come_at_once_and_nothing_is_written(tmp_path, media):
    with pytest.raises(RejectedRecordsError) as error:
        write(tmp_path, [answer(), *BAD, answer()], media)
    text = str(error.value)
    assert "5 of 7 records" in text
    assert "2 like these" in text
    for part in ("records.jsonl:2", "nowhere.jpg", "empty file", "no conversation", "this is a list"):
        assert part in text
    assert not (tmp_path / "out").exists()


def test_bad_records_are_skipped_only_when_asked_and_are_listed(tmp_path, media):
    report = write(tmp_path, [answer(), *BAD, answer()], media, skip_rejected=True)
    assert report.num_written + len(report.rejected) == 7
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [line["where"].rpartition(":")[2] for line in lines] == ["2", "3", "4", "5", "6"]
    assert all(line["reason"] for line in lines)


def test_nothing_good_is_an_error_even_when_skipping(tmp_path, media):
    with pytest.raises(RejectedRecordsError):
        write(tmp_path, BAD, media, skip_rejected=True)
    with pytest.raises(ValueError, match="no records in"):
        write(tmp_path, [], media)


def test_what_exists_is_never_overwritten(tmp_path, media):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="left as it is"):
        write(tmp_path, [answer()], media)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious.txt"]


def test_a_killed_run_leaves_no_folder_of_that_name_and_the_next_one_succeeds(tmp_path, media):
    class Killed(BaseException):
        pass

    def kill(what, count):
        if what == "writing" and count == 4:
            raise Killed

    records = [answer()] * 5
    file = tmp_path / "r.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    given = AnnotatedRecords((str(file),), (media,))
    options = {"max_samples": 2, "max_bytes": 10**9, "skip_rejected": False}
    with pytest.raises(Killed):
        write_shards(given, tmp_path / "out", progress=kill, **options)
    assert not (tmp_path / "out").exists()
    assert write_shards(given, tmp_path / "out", progress=lambda *_: None, **options).num_shards == 3
