"""A damaged file is found before it is read."""

from __future__ import annotations

import random

import pytest

from vl3train.data.sealed import (
    DIGEST_BYTES,
    DamagedFileError,
    read_sealed_json,
    seal,
    sealed_size,
    write_sealed_json,
)


def test_every_change_of_a_sealed_file_is_found(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(range(200)))
    seal(path)
    good = path.read_bytes()
    assert (sealed_size(path), len(good)) == (200, 200 + DIGEST_BYTES)
    rng = random.Random(0)
    cuts = [good[:length] for length in range(0, len(good), 7)]
    flips = [
        good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :] for at in range(len(good))
    ]
    for bad in [*cuts, *flips, good + b"0"]:
        path.write_bytes(bad)
        with pytest.raises(DamagedFileError, match="a is damaged"):
            sealed_size(path)
    with pytest.raises(FileNotFoundError):
        sealed_size(tmp_path / "b")


def test_every_change_of_a_sealed_object_is_found(tmp_path):
    path = tmp_path / "a.json"
    content = {"words": ["ä", "b"], "number": 3, "nothing": None}
    write_sealed_json(path, content)
    assert read_sealed_json(path) == content
    good = path.read_text()
    wrong = [
        good.replace("3", "4"),
        good[:-3],
        good.replace("sha256", "sha"),
        "",
        "[1]",
        "3",
        '{"sha256": 1}',
        "[" * 9**5,
    ]
    for bad in wrong:
        path.write_text(bad)
        with pytest.raises(DamagedFileError, match=r"a\.json is damaged"):
            read_sealed_json(path)
    path.write_bytes(b"\xff" + good.encode())
    with pytest.raises(DamagedFileError):
        read_sealed_json(path)
