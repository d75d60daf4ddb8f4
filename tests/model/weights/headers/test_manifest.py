"""Damage of any file of a checkpoint is found and named."""

from __future__ import annotations

import json

import pytest
import xxhash

from tests.engine.checkpoints.made import make
from vl3train.model.weights.headers.manifest import damage, file_digest, list_files, read_manifest, share_of


def test_the_digest_is_that_of_the_library(tmp_path):
    content = bytes(range(256)) * 200_000  # over one chunk
    (tmp_path / "a").write_bytes(content)
    assert file_digest(tmp_path / "a") == xxhash.xxh3_128_hexdigest(content)


def test_one_flipped_byte_of_any_file_is_found(tmp_path):
    folder = make(tmp_path, 1)
    assert damage(folder) == []
    for name in list_files(folder):
        file = folder / name
        whole = file.read_bytes()
        file.write_bytes(whole[:20] + bytes([whole[20] ^ 1]) + whole[21:])
        assert damage(folder) == [f"{name} is not what was written: its digest differs"]
        file.write_bytes(whole)
    assert damage(folder) == []


def test_every_file_is_read_by_one_of_the_readers(tmp_path):
    folder = make(tmp_path, 1)
    (folder / "engine" / "weights.bin").write_bytes(b"y" * 100)
    found = [damage(folder, index=index, count=3) for index in range(3)]
    assert sorted(map(len, found)) == [0, 0, 1]
    sizes = {f"f{number}": number for number in range(20)}
    assert sorted(name for index in range(3) for name in share_of(sizes, index, 3)) == sorted(sizes)


def test_missing_and_short_files_are_named(tmp_path):
    folder = make(tmp_path, 1)
    (folder / "engine" / "weights.bin").write_bytes(b"x" * 60)
    (folder / "resume.json").unlink()
    text = "; ".join(damage(folder))
    assert "engine/weights.bin has 60 of 100 bytes" in text
    assert "resume.json is missing (" in text
    assert damage(folder, below="weights/") == [], "not looked at"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not JSON",
        b"[]",
        b"3",
        b'{"files": 3}',
        b'{"files": {"a": {"bytes": "1"}}}',
        b'{"a": null}',
        b"\xff",
    ],
)
def test_a_damaged_manifest_is_damage(tmp_path, content):
    folder = make(tmp_path, 1)
    (folder / "MANIFEST.json").write_bytes(content)
    assert damage(folder)
    assert "MANIFEST.json" in damage(folder)[0]


def test_a_flipped_bit_of_the_manifest_is_damage_of_the_manifest_or_changes_nothing(tmp_path):
    folder = make(tmp_path, 1)
    file = folder / "MANIFEST.json"
    whole, meant = file.read_bytes(), read_manifest(folder)
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        found = damage(folder)
        assert "MANIFEST.json is damaged" in found[0] if found else read_manifest(folder) == meant


def test_a_manifest_of_sizes_only_is_still_read(tmp_path):
    folder = make(tmp_path, 1)
    (folder / "MANIFEST.json").write_text(json.dumps(list_files(folder)))
    assert damage(folder) == []
    (folder / "engine" / "weights.bin").write_bytes(b"")
    assert damage(folder) == ["engine/weights.bin has 0 of 100 bytes"]
