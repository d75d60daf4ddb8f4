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


@pytest.mark.parametrize(
    "name", ["/etc/a.json", "../a.json", "x/../../a.json", ".json", "sub/.json", "a\x1b[31m.json"]
)
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


DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X"


def test_a_folder_packed_on_a_mac_gives_its_samples(tmp_path):
    """Between the members of a sample lie what the Mac knows of each file, and of the folder."""
    plain = [("./a/1.jpg", b"x"), ("./a/1.json", b"{}"), ("./a/2.0.jpg", b"y"), ("./a/2.json", b"{}")]
    members = [("./._a", DOUBLE), ("./a/.DS_Store", b"Bud1")]
    for name, data in plain:
        folder, slash, last = name.rpartition("/")
        members += [(f"{folder}{slash}._{last}", DOUBLE), (name, data)]
    members += [
        ("__MACOSX/a/._1.json", DOUBLE),
        ("a/PaxHeaders.12/1.json", b"30 mtime=1"),
        ("Thumbs.db", b""),
    ]
    samples = shard_samples(make_tar(tmp_path / "a.tar", members))
    expected = shard_samples(make_tar(tmp_path / "b.tar", plain))
    assert not faults(samples)
    parts = [[(part.name, part.size) for part in sample.parts] for sample in samples]
    assert parts == [[(part.name, part.size) for part in sample.parts] for sample in expected]
    unread = sorted(name for sample in samples for name in sample.ignored)
    assert unread == sorted([*["._*"] * 6, ".DS_Store", "PaxHeader", "Thumbs.db"])


def test_a_name_with_a_dot_in_front_is_a_sample_where_it_accompanies_none(tmp_path):
    samples = shard_samples(make_tar(tmp_path / "a.tar", [("._a.json", b"{}"), ("._a.0.jpg", b"x")]))
    assert good(samples) == ["._a"]
    assert len(samples[0].parts) == 2


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_sample_that_lost_a_picture_is_rejected_with_the_reason(tmp_path, number):
    """A caption would be trained with the other pictures alone."""
    members = [("a.json", b"{}"), ("b.0.jpg", b"x"), ("b.1.jpg", b"x"), ("b.2.jpg", b"x"), ("b.txt", b"two")]
    shard = make_tar(tmp_path / "a.tar", [*members, ("c.json", b"{}")])
    data = bytearray(shard.read_bytes())
    at = 1024 * (number + 1)
    data[at + 156] = ord("S")
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    shard.write_bytes(data)
    assert good(shard_samples(shard)) == ["a", "c"]
    assert "sparse file" in faults(shard_samples(shard))["b"]
    data[at + 3] ^= 0xFF
    shard.write_bytes(data)
    damaged = faults(shard_samples(shard))
    assert f"damaged header at byte {at}" in damaged[f"@{at}"]
    assert ("b" in damaged) == (number > 0)  # at the edge of a sample it may be another's


def test_thousands_of_members_of_one_key_take_no_longer_than_their_number(tmp_path):
    header = tarfile.TarInfo("a.0.jpg").tobuf(tarfile.USTAR_FORMAT)
    (tmp_path / "a.tar").write_bytes(header * 5000 + bytes(1024))
    (sample,) = shard_samples(tmp_path / "a.tar")
    assert "comes twice" in str(sample.rejection)
