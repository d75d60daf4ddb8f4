"""Storage that is gone or blocks for a while costs no sample."""

from __future__ import annotations

import os
import threading
import time

import pytest

from vl3train.contracts.progress.record import progress
from vl3train.contracts.records import SampleError
from vl3train.data.shards import read
from vl3train.data.shards.patience import Patience
from vl3train.data.shards.read import read_parts
from vl3train.data.shards.tar_headers import Part

PARTS = [Part("json", 512, 4), Part("jpg", 1024, 5)]
WANTED = {"json": b"text", "jpg": b"image"}


@pytest.fixture
def shard(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "_patience", Patience())
    path = tmp_path / "0.tar"
    path.write_bytes(bytes(512) + b"text" + bytes(508) + b"image" + bytes(100))
    return path


def later(seconds, act):
    thread = threading.Thread(target=lambda: (time.sleep(seconds), act()))
    thread.start()
    return thread


def test_a_shard_that_comes_back_is_read(shard, capsys):
    away = shard.rename(shard.with_suffix(".away"))
    thread = later(0.3, lambda: away.rename(shard))
    assert read_parts(shard, PARTS, retry_seconds=20.0) == WANTED
    thread.join()
    told = capsys.readouterr().err
    assert f"{shard} cannot be read: [Errno 2]" in told
    assert f"{shard} can be read again" in told


def test_a_read_that_blocks_is_named_and_goes_on_when_the_file_is_back(shard):
    """A pipe in the shard's place blocks the one who opens it, whatever comes under its name later."""
    away = shard.rename(shard.with_suffix(".away"))
    os.mkfifo(shard)
    seen = []

    def bring_back():
        seen.append(progress.seen().place)
        away.replace(shard)

    thread = later(0.3, bring_back)
    assert read_parts(shard, PARTS) == WANTED
    thread.join()
    assert seen == [f"{shard}, bytes 512 to 1029"]


def test_storage_that_is_lost_costs_the_wait_once(shard):
    shard.unlink()
    for expected in (0.3, 0.0, 0.0):
        begin = time.monotonic()
        with pytest.raises(SampleError, match=r"0\.tar cannot be read: .*No such file"):
            read_parts(shard, PARTS, retry_seconds=0.4)
        assert expected - 0.2 <= time.monotonic() - begin < expected + 0.3
    shard.write_bytes(bytes(2000))
    assert read_parts(shard, PARTS, retry_seconds=0.4)["json"] == bytes(4), (
        "and is waited for again from now on"
    )
