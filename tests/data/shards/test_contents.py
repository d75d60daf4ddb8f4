"""What differs between two sets of shards is said by kind and name, in few lines however many there are."""

from __future__ import annotations

import gzip
import hashlib

import pytest

from vl3train.data.shards.contents import (
    Contents,
    changes,
    manifest_changes,
    read_contents,
    shard_changes,
    write_contents,
)

SHARDS = {f"a-{number}.tar": (1000, 6, 0, f"digest-{number}") for number in range(4)}


def contents(shards, name="words", **settings):
    return Contents(settings={"max_frames": 16, **settings}, sources={name: shards})


def test_equal_data_have_no_changes():
    assert changes(contents(SHARDS), contents(dict(SHARDS))) == []


@pytest.mark.parametrize(
    ("now", "says"),
    [
        ({**SHARDS, "a-4.tar": (5, 1, 0, "x")}, "1 shard added: a-4.tar"),
        ({name: SHARDS[name] for name in ("a-1.tar", "a-3.tar")}, "2 shards removed: a-0.tar, a-2.tar"),
        (
            {**SHARDS, "a-1.tar": (1200, 7, 1, "x")},
            "1 shard replaced: a-1.tar (1000 bytes, now 1200; 6 samples, now 7; 0 rejected, now 1)",
        ),
        (
            {**SHARDS, "a-1.tar": (1000, 6, 0, "x")},
            "1 shard replaced: a-1.tar (as many bytes and samples, others than before)",
        ),
        ({**SHARDS, "a-1.tar": (None, 6, 0, "digest-1")}, "a-1.tar (1000 bytes, now remote)"),
    ],
)
def test_what_changed_in_a_source_is_said(now, says):
    (line,) = changes(contents(SHARDS), contents(now))
    assert line.startswith("source words: ")
    assert says in line


def test_of_many_changes_the_first_are_named_and_all_counted():
    many = {f"b-{number:05d}.tar": (1, 1, 0, "x") for number in range(2000)}
    (line,) = shard_changes({}, many)
    assert line.startswith("2,000 shards added: b-00000.tar, b-00001.tar, ")
    assert line.endswith(" and 1,995 more")


def test_other_settings_are_said_and_the_rows_that_they_change_are_not():
    rows = {name: (size, samples, bad, "x") for name, (size, samples, bad, _) in SHARDS.items()}
    rows["a-2.tar"] = (1300, 6, 0, "x")
    found = changes(contents(SHARDS), contents(rows, max_frames=32))
    assert found == [
        "setting max_frames: 16, now 32",
        "source words: 1 shard replaced: a-2.tar (1000 bytes, now 1300)",
    ]


def test_sources_that_come_go_and_change_places_are_said():
    before = Contents(settings={}, sources={"a": SHARDS, "b": SHARDS, "c": SHARDS})
    now = Contents(settings={}, sources={"c": SHARDS, "a": SHARDS, "d": SHARDS})
    assert changes(before, now) == [
        "source b (4 shards): is gone",
        "source d (4 shards): is new",
        "the order of the sources: a, b, c, now c, a, d",
    ]


def manifest(shards, decoded=False):
    keys = ("bytes", "samples", "rejected", "rows_sha256")
    return {
        "shards": [
            {"name": name, "decoded": decoded, **dict(zip(keys, facts, strict=True))}
            for name, facts in shards.items()
        ]
    }


def test_an_index_that_is_made_again_with_decode_is_no_change_of_the_shards():
    rows = {name: (size, samples, 1, "x") for name, (size, samples, _, _) in SHARDS.items()}
    assert manifest_changes("words", manifest(SHARDS), manifest(rows, decoded=True)) == []
    assert len(manifest_changes("words", manifest(SHARDS), manifest(rows))) == 1


def test_a_hundred_thousand_shards_take_two_megabytes(tmp_path):
    shards = {
        f"shard-{number:06d}.tar": (
            number * 37,
            number % 900,
            0,
            hashlib.sha256(b"%d" % number).hexdigest()[:16],
        )
        for number in range(20_000)
    }
    file = tmp_path / "contents"
    write_contents(file, {"train": contents(shards)})
    assert read_contents(file) == {"train": contents(shards)}
    assert file.stat().st_size < 400_000  # of a fifth of them


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-9],
        lambda data: b"",
        lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
        lambda data: gzip.compress(b"[1]"),
        lambda data: gzip.compress(b'{"train": 1}'),
        lambda data: gzip.compress(b'{"train": {"settings": {}}}'),
    ],
)
def test_a_damaged_file_is_none(tmp_path, damage):
    file = tmp_path / "contents"
    assert read_contents(file) is None
    write_contents(file, {"train": contents(SHARDS)})
    file.write_bytes(damage(file.read_bytes()))
    assert read_contents(file) is None
