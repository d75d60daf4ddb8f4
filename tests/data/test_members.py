"""Every way in which plain webdataset loses samples silently is an error here; good tars read as tarfile does."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from vl3train.data.members import BadShard, shard_samples


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


def test_cut_off_anywhere_is_refused(tmp_path):
    data = make_tar(tmp_path / "a.tar", MEMBERS).read_bytes()
    cut = tmp_path / "cut.tar"
    with tarfile.open(tmp_path / "a.tar") as tar:
        ends = [info.offset_data + info.size for info in tar]
    for length in (0, 100, 512, 700, 1024, ends[4] - 1, -(-ends[4] // 512) * 512, ends[-1]):
        cut.write_bytes(data[:length])
        with pytest.raises(BadShard, match="cut off"):
            shard_samples(cut)


def test_a_damaged_header_is_refused(tmp_path):
    shard = make_tar(tmp_path / "a.tar", MEMBERS)
    data = bytearray(shard.read_bytes())
    data[1024 + 20] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(BadShard, match="damaged header at byte 1024"):
        shard_samples(shard)


def test_something_that_is_no_tar_is_refused(tmp_path):
    page = tmp_path / "a.tar"
    page.write_bytes(b"<html>404 Not Found</html>" * 100)
    with pytest.raises(BadShard, match="damaged header at byte 0"):
        shard_samples(page)


@pytest.mark.parametrize("name", ["/etc/a.json", "../a.json", "x/../../a.json", "no_part", ".json"])
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    with pytest.raises(BadShard, match="names must be relative"):
        shard_samples(make_tar(tmp_path / "a.tar", [(name, b"{}")]))


def test_links_are_refused_and_folders_passed_over(tmp_path):
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        folder = tarfile.TarInfo("sub")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        info = tarfile.TarInfo("./sub/a.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    assert [sample.key for sample in shard_samples(shard)] == ["sub/a"]
    with tarfile.open(shard, "w") as tar:
        link = tarfile.TarInfo("a.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(BadShard, match="is a link"):
        shard_samples(shard)


def test_members_of_one_key_apart_are_refused(tmp_path):
    with pytest.raises(BadShard, match="'a' are not adjacent"):
        shard_samples(make_tar(tmp_path / "a.tar", [("a.json", b"1"), ("b.json", b"1"), ("a.0.jpg", b"1")]))


@pytest.mark.parametrize(
    ("parts", "fault"),
    [
        (["json", "0.jpg", "1.mp4"], None),
        (["0.jpg"], "conversation is missing"),
        (["json", "json"], "comes twice"),
        (["json", "pyd"], "neither .json nor"),
        (["json", "0.jpg.gz"], "neither .json nor"),
    ],
)
def test_parts_that_are_no_sample_are_named(tmp_path, parts, fault):
    (sample,) = shard_samples(make_tar(tmp_path / "a.tar", [(f"a.{part}", b"1") for part in parts]))
    assert (sample.fault() is None) if fault is None else fault in str(sample.fault())
