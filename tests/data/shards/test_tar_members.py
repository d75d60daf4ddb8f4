"""Every odd header costs its own member; the members around it are those that tarfile reads; every loop ends."""

from __future__ import annotations

import io
import os
import random
import tarfile
import tracemalloc

import pytest

from vl3train.data.shards import tar_members
from vl3train.data.shards.tar_fields import HeaderError, parse_header, pax_fields
from vl3train.data.shards.tar_headers import shard_samples
from vl3train.data.shards.tar_members import Member, RejectedPlace, read_members

BEFORE, AFTER = "before.json", "sub/after.json"


def member(
    name: str = "b.0.jpg", data: bytes = b"picture" * 100, format: int = tarfile.USTAR_FORMAT, **fields
):
    """Header and data of one member, and its pax or GNU headers before it."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(format, "utf-8", "surrogateescape") + data + bytes(-len(data) % 512)


def with_field(raw: bytes, at: int, value: bytes) -> bytes:
    """The same with another value in its first header, whose checksum is right."""
    header = bytearray(raw[:512])
    header[at : at + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + raw[512:]


def extension(kind: bytes, body: bytes, size: int | None = None) -> bytes:
    raw = with_field(member("PaxHeader", body), 156, kind)
    return raw if size is None else with_field(raw, 124, b"%011o\0" % size)


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(b"%d" % length) + len(key) + len(value) + 3 != length:
        length = len(b"%d" % length) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (length, key, value)


def around(odd: bytes) -> bytes:
    return member(BEFORE, b"{}") + odd + member(AFTER, b"[1]") + bytes(1024)


SIZE, TYPE, NAME = 124, 156, 0
SPARSE_BLOCK = bytes(504) + b"\0" * 8
ODD = {
    "a name that is not UTF-8": (with_field(member(), NAME, b"M\xfcller.0.jpg"), "is not UTF-8"),
    "such a name on a member that nobody reads": (with_field(member(), NAME, b"M\xfcll.pyd"), "is not UTF-8"),
    "such a name in pax": (extension(b"x", record(b"path", b"M\xfcller.jpg")) + member(), "is not UTF-8"),
    "such a name in GNU's form": (extension(b"L", b"M\xfcller.jpg\0") + member(), "is not UTF-8"),
    "a name of 5000 bytes": (extension(b"L", b"x" * 5000) + member(), "limit of 4096"),
    "a negative size": (with_field(member(), SIZE, b"\xff" * 11 + b"\x80"), "a negative number"),
    "a negative octal size": (with_field(member(), SIZE, b"-0000000764\0"), "no octal number"),
    "words for a size": (with_field(member(), SIZE, b"many bytes\0\0"), "no octal number"),
    "a huge size": (with_field(member(), SIZE, b"\x80" + b"\0" * 3 + b"\x70" * 8), "bytes are missing"),
    "a size beyond the file": (with_field(member(), SIZE, b"00000077777\0"), "bytes are missing"),
    "a size up to the end mark": (with_field(member(), SIZE, b"%011o\0" % 1600), "next member begins"),
    "a size into its neighbour": (with_field(member(), SIZE, b"%011o\0" % 1100), "next member begins"),
    "a pax size that is no number": (
        extension(b"x", record(b"size", b"-700")) + member(),
        "damaged: its size",
    ),
    "a pax size beyond the file": (extension(b"x", record(b"size", b"9" * 25)) + member(), "are missing"),
    "a pax record without end": (extension(b"x", b"999 path=b.1.jpg\n") + member(), "record at byte 0"),
    "a pax record of length 0": (extension(b"x", b"0 path=b.1.jpg\n") + member(), "record at byte 0"),
    "a pax record of 10^40 bytes": (
        extension(b"x", b"1" + b"0" * 40 + b" a=b\n") + member(),
        "record at byte 0",
    ),
    "a pax header that is text": (extension(b"x", b"hello, world") + member(), "record at byte 0"),
    "a pax header over the limit": (extension(b"x", b"5 a=\n" * 300_000) + member(), "over the limit"),
    "a long name over the limit": (extension(b"L", b"x" * (2**20 + 1)) + member(), "over the limit"),
    "a negative size of a pax header": (
        with_field(extension(b"x", record(b"path", b"b.1.jpg")), SIZE, b"\xff" * 12) + member(),
        "a negative number",
    ),
    "a global name": (extension(b"g", record(b"path", b"c.json")), "all members one path"),
    "a global size": (extension(b"g", record(b"size", b"7")), "all members one size"),
    "a sparse member of GNU": (with_field(member(), TYPE, b"S"), "sparse file"),
    "one that goes on for two blocks": (
        with_field(with_field(member(data=b"y" * 700), TYPE, b"S"), 482, b"\1")[:512]
        + (bytes(504) + b"\1" + bytes(7) + bytes(512))
        + b"y" * 700
        + bytes(324),
        "sparse file",
    ),
    "a sparse member of pax": (
        extension(b"x", record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.name", b"b.0.jpg"))
        + member("GNUSparseFile.7/b.0.jpg"),
        "member 'b.0.jpg': it is a sparse file",
    ),
    "an unknown type": (with_field(member(), TYPE, b"Z"), "of type b'Z'"),
    "a wrong checksum": (member()[:20] + b"\x07" + member()[21:], "checksum is wrong"),
    "a checksum that is no number": (member()[:148] + b"!" * 8 + member()[156:], "no octal number"),
    "100 stray bytes": (b"\x07" * 100, "damaged header at byte 1024"),
    "a pax header and then the end": (
        extension(b"x", record(b"path", b"a")) + bytes(1024),
        "no member behind",
    ),
}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_header_is_one_rejected_member_and_its_neighbours_are_used(tmp_path, odd):
    raw, said = ODD[odd]
    shard = tmp_path / "a.tar"
    shard.write_bytes(around(raw))
    found = read_members(shard)
    data = shard.read_bytes()
    used = {one.name: data[one.offset : one.offset + one.size] for one in found if isinstance(one, Member)}
    (place,) = [one for one in found if isinstance(one, RejectedPlace)]
    assert (used, said in place.reason) == ({BEFORE: b"{}", AFTER: b"[1]"}, True), place
    assert 1024 <= place.at <= 1024 + len(raw)
    told = {sample.key: sample.rejection for sample in shard_samples(shard)}
    assert {key for key, reason in told.items() if reason is None} == {"before", "sub/after"}
    assert place.reason.encode()  # no half of a surrogate pair: an index holds UTF-8
    assert told[f"@{place.at}"] == place.reason


GOOD = {
    "a binary size": with_field(member(), SIZE, b"\x80" + bytes(9) + (700).to_bytes(2)),
    "a size in spaces": with_field(member(), SIZE, b"      1274 \0"),
    "a pax size": extension(b"x", record(b"size", b"700")) + with_field(member(), SIZE, b"0" * 11 + b"\0"),
    "a pax name": extension(b"x", record(b"path", b"b.0.jpg")) + member("PaxHeaders.9/odd"),
    "an empty pax header": extension(b"x", b"") + member(),
    "a global comment": extension(b"g", record(b"comment", b"0123abc")) + member(),
    "a GNU name": extension(b"L", b"b.0.jpg\0junk") + member("././@LongLink"),
    "a volume label": with_field(member("tape 7", b""), TYPE, b"V") + member(),
    "a contiguous file": with_field(member(), TYPE, b"7"),
    "a v7 header": with_field(member(), 257, bytes(8)),
    "a folder with a size": with_field(member("sub/", b""), SIZE, b"00000010000\0") + member(),
    "a negative time": with_field(member(), 136, b"\xff" * 12) + b"",
    "an owner that is no number": with_field(member(), 108, b"nobody!!"),
    "a signed checksum": b"",
    "an archive before": member() + bytes(1024),
    "one zero block in the middle": member() + bytes(512),
    "times in GNU's place of the prefix": with_field(member(format=tarfile.GNU_FORMAT), 345, b"14000000000"),
}


@pytest.mark.parametrize("odd", GOOD)
def test_a_header_that_tools_write_is_read(tmp_path, odd):
    raw = GOOD[odd]
    if odd == "a signed checksum":
        header = bytearray(with_field(member(), 265, b"\xe4\xe4")[:512])
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]) - 512)
        raw = bytes(header) + member()[512:]
    shard = tmp_path / "a.tar"
    shard.write_bytes(around(raw))
    found = read_members(shard)
    assert [one.name for one in found if isinstance(one, Member)] == [BEFORE, "b.0.jpg", AFTER], found
    assert found[1].size == 700  # type: ignore[union-attr]
    assert len(found) == 3


def test_a_link_has_no_data_whatever_its_size_says(tmp_path):
    link = with_field(member("b.0.jpg", b"", type=tarfile.SYMTYPE, linkname="x"), SIZE, b"00000010000\0")
    (tmp_path / "a.tar").write_bytes(around(link))
    found = read_members(tmp_path / "a.tar")
    assert [one.name for one in found] == [BEFORE, "b.0.jpg", AFTER]


def test_headers_found_again_across_the_windows_of_the_search(tmp_path, monkeypatch):
    shard = tmp_path / "a.tar"
    for lost in range(700, 3000, 64):
        shard.write_bytes(around(b"\x07" * lost))
        expected = read_members(shard)
        with monkeypatch.context() as patch:
            patch.setattr(tar_members, "SEARCHED_BYTES", 512)
            assert read_members(shard) == expected
        assert [one.name for one in expected if isinstance(one, Member)] == [BEFORE, AFTER]


def test_a_tar_within_the_tar_is_one_member_also_where_it_is_cut_off(tmp_path):
    inner = member("inner.json", b"{}") + bytes(1024)
    data = member("b.tar", inner * 9)
    (tmp_path / "a.tar").write_bytes(member(BEFORE, b"{}") + data[:-700])
    assert [one.name for one in read_members(tmp_path / "a.tar")] == [BEFORE, "b.tar"]


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_what_is_no_file_is_named(tmp_path, kind):
    shard = tmp_path / "x.tar"
    if kind == "folder":
        shard.mkdir()
    elif kind == "link":
        shard.symlink_to("nowhere/y.tar")
    else:
        os.mkfifo(shard)
    (place,) = read_members(shard)
    said = {"folder": "is a folder", "link": "a link to nowhere/y.tar", "pipe": "is no file"}
    assert said[kind] in place.reason


def test_memory_is_bounded_whatever_the_headers_say(tmp_path):
    shard = tmp_path / "a.tar"
    liar = with_field(member(), SIZE, b"\x80" + b"\0" * 6 + b"\x70" * 5)
    shard.write_bytes(around(liar * 50 + extension(b"x", b"5 a=\n" * 1_000_000)))
    tracemalloc.start()
    read_members(shard)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * tar_members.SEARCHED_BYTES


@pytest.mark.parametrize("seed", range(3))
def test_random_blocks_and_records_are_read_or_rejected(seed):
    rng = random.Random(seed)
    for _ in range(500):
        for parse, data in ((parse_header, rng.randbytes(512)), (pax_fields, rng.randbytes(60))):
            try:
                parse(data)
            except HeaderError:
                continue


def test_what_is_read_is_what_tarfile_reads(tmp_path):
    names = ["a.json", "ü/ß.json", "x" * 99 + "/y.json", "z/" * 130 + "w.json"]
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        some = names[:3] if format == tarfile.USTAR_FORMAT else names
        data = b"".join(member(name, name.encode(), format) for name in some) + bytes(1024)
        (tmp_path / "a.tar").write_bytes(data)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            theirs = [(info.name, info.offset_data, info.size) for info in tar]
        ours = read_members(tmp_path / "a.tar")
        assert [(one.name, one.offset, one.size) for one in ours if isinstance(one, Member)] == theirs
        assert len(ours) == len(theirs)
