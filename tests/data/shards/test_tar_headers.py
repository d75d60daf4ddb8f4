"""Every way in which plain webdataset loses samples silently is an error here; good tars read as tarfile does."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from vl3train.data.shards.tar_headers import Part, shard_samples


def make_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


MEMBERS = [(f"{i:03d}.{part}", os.urandom(1 + 700 * i)) for i in range(5) for part in ("0.jpg", "json")]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_and_sizes_are_those_of_the_data(tmp_path, format):
    long = "sub/" * 40 + "x" * 30
    shard = make_tar(tmp_path / "a.tar", [*MEMBERS, (f"{long}.json", b"{}"), ("ü.json", b"[]")], format)
    samples = shard_samples(shard)
    data = shard.read_bytes()
    read = [
        (f"{sample.key}.{part.name}", data[part.offset : part.offset + part.size])
        for sample in samples
        for part in sample.parts
    ]
    with tarfile.open(shard) as tar:
        assert read == [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    assert [len(sample.parts) for sample in samples] == [2] * 5 + [1, 1]


def good(samples):
    return [sample.key for sample in samples if sample.rejection is None]


def faults(samples):
    return {sample.key: sample.rejection for sample in samples if sample.rejection is not None}


def test_cut_off_anywhere_is_told_and_what_is_whole_stays(tmp_path):
    data = make_tar(tmp_path / "a.tar", MEMBERS).read_bytes()
    cut = tmp_path / "cut.tar"
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = list(tar)
    ends = [info.offset_data + info.size for info in members]
    for length in (0, 100, 512, 700, 1024, ends[4] - 1, -(-ends[4] // 512) * 512, ends[-1]):
        cut.write_bytes(data[:length])
        samples = shard_samples(cut)
        told = [reason for key, reason in faults(samples).items() if key.startswith("@")]
        assert len(told) == 1, length
        assert "cut off" in told[0] or "is empty" in told[0]
        assert good(samples) == [f"{i:03d}" for i in range(5) if ends[2 * i + 1] <= length]


@pytest.mark.parametrize("number", range(10))
def test_a_damaged_header_costs_its_own_sample_only(tmp_path, number):
    shard = make_tar(tmp_path / "a.tar", MEMBERS)
    with tarfile.open(shard) as tar:
        place = list(tar)[number].offset
    data = bytearray(shard.read_bytes())
    data[place + 20] ^= 0xFF
    shard.write_bytes(data)
    samples = shard_samples(shard)
    told = faults(samples)[f"@{place}"]
    assert f"damaged header at byte {place}" in told
    assert ("nothing behind it" if number == 9 else "next readable member") in told
    victim = number // 2
    with_text = [f"{i:03d}" for i in range(5) if i != victim or number % 2 == 0]
    assert good(samples) == with_text  # without its picture the conversation will say what is missing
    assert [sample.key for sample in samples if sample.parts] == [f"{i:03d}" for i in range(5)]


def test_something_that_is_no_tar_is_told(tmp_path):
    page = tmp_path / "a.tar"
    page.write_bytes(b"<html>404 Not Found</html>" * 100)
    (sample,) = shard_samples(page)
    assert "damaged header at byte 0" in str(sample.rejection)


@pytest.mark.parametrize("name", ["/etc/a.json", "../a.json", "x/../../a.json", ".json", "sub/.json"])
def test_names_that_lead_elsewhere_are_told(tmp_path, name):
    samples = shard_samples(make_tar(tmp_path / "a.tar", [("good.json", b"{}"), (name, b"{}")]))
    assert good(samples) == ["good"]
    assert "name" in faults(samples)["@1024"]


def test_links_are_told_and_folders_passed_over(tmp_path):
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        folder = tarfile.TarInfo("sub")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("a.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        info = tarfile.TarInfo("./sub/a.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    samples = shard_samples(shard)
    assert good(samples) == ["sub/a"]
    assert "is a link" in faults(samples)["@512"]


def test_members_of_one_key_apart_cost_that_sample_only(tmp_path):
    members = [("a.json", b"1"), ("b.json", b"1"), ("a.0.jpg", b"1"), ("c.json", b"1")]
    samples = shard_samples(make_tar(tmp_path / "a.tar", members))
    assert good(samples) == ["b", "c"]
    assert "not adjacent" in faults(samples)["a"]


def test_an_appended_archive_is_read_too(tmp_path):
    first = make_tar(tmp_path / "a.tar", [("a.json", b"1")]).read_bytes()
    second = make_tar(tmp_path / "b.tar", [("b.json", b"1")]).read_bytes()
    (tmp_path / "c.tar").write_bytes(first + second)
    assert good(shard_samples(tmp_path / "c.tar")) == ["a", "b"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["v1.5_img0.jpg", "v1.5_img0.txt"], {"v1.5_img0": ["jpg", "txt"]}),
        (["a.b/c.d.0.jpg", "a.b/c.d.1.png", "a.b/c.d.json"], {"a.b/c.d": ["0.jpg", "1.png", "json"]}),
        (["i.5.jpg", "i.5.txt", "i.6.jpg", "i.6.txt"], {"i.5": ["jpg", "txt"], "i.6": ["jpg", "txt"]}),
        (["7.JPG", "7.Json"], {"7": ["jpg", "json"]}),
    ],
)
def test_keys_with_dots(tmp_path, names, expected):
    samples = shard_samples(make_tar(tmp_path / "a.tar", [(name, b"1") for name in names]))
    assert {sample.key: [part.name for part in sample.parts] for sample in samples} == expected
    assert not faults(samples)


@pytest.mark.parametrize(
    ("parts", "fault", "unread"),
    [
        (["json", "0.jpg", "1.mp4"], None, ()),
        (["0.jpg"], "conversation is missing", ()),
        (["json", "json"], "comes twice", ()),
        (["json", "pyd"], None, ("pyd",)),
        (["json", "0.jpg.gz", "pickle"], None, ("0.jpg.gz", "pickle")),
    ],
)
def test_parts_that_are_no_sample_are_named_and_others_never_read(tmp_path, parts, fault, unread):
    (sample,) = shard_samples(make_tar(tmp_path / "a.tar", [(f"a.{part}", b"1") for part in parts]))
    assert (sample.rejection is None) if fault is None else fault in str(sample.rejection)
    assert sample.ignored == unread
    assert all(isinstance(part, Part) and part.name not in unread for part in sample.parts)
