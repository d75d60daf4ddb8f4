"""Remote shards give what local ones give, over a server that fails now and then; the cache keeps its bound."""

from __future__ import annotations

import http.server
import os
import random
import re
import shutil
import threading
import time
from pathlib import Path

import fsspec
import pytest

from tests.data.shards_fixture import make_recipe, train_config
from tests.data.test_pipeline import run_steps
from vl3train.contracts.records import Cursor
from vl3train.data.pipeline import open_data
from vl3train.data.shards import remote
from vl3train.data.shards.remote import RangeCache, RemoteError, fetched, read_range, remote_size


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)


class Flaky(http.server.BaseHTTPRequestHandler):
    """A file server with ranges that answers every fourth request with an error, a cut, or not at all."""

    root: Path
    requests = 0
    failures = 0

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        kind = type(self)
        kind.requests += 1
        path = self.root / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        whole = len(data)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked:
            first, last = int(asked[1]), int(asked[2])
            data = data[first : last + 1]
        fails = body and kind.requests % 4 == 0
        kind.failures += fails
        if fails and kind.failures % 3 == 0:
            self.send_error(503)
            return
        if fails and kind.failures % 3 == 1:
            self.close_connection = True
            return
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{whole}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if fails else data)
        if fails:
            self.close_connection = True


@pytest.fixture
def server(tmp_path):
    pytest.importorskip("aiohttp")
    handler = type("Handler", (Flaky,), {"root": tmp_path / "served", "requests": 0, "failures": 0})
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{served.server_address[1]}", handler
    served.shutdown()
    thread.join()


def as_remote(root: Path, base: str, served: Path) -> None:
    """Move every shard below ``root`` to ``served`` and leave the lists."""
    for folder in {path.parent for path in root.rglob("*.tar")}:
        lines = []
        for shard in sorted(folder.glob("*.tar")):
            target = served / shard.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(shard, target)
            lines.append(f"{base}/{shard.relative_to(root)}")
        (folder / "shards.txt").write_text("\n".join(["# where they are", *lines]) + "\n")


@pytest.mark.parametrize("cached", [False, True])
def test_training_over_a_flaky_server_equals_training_on_files(tmp_path, tokenizer_dir, server, cached):
    base, handler = server
    cfg = train_config(tmp_path / "data", make_recipe(tmp_path / "data"))

    def steps():
        data = open_data(cfg, tokenizer_dir=tokenizer_dir, held_out=False, build=True)
        last = data.plan.steps_in_epoch(0) + 2
        ledger = tmp_path / "ledger"
        hashes = run_steps(data, cfg, Cursor(), last, 1, ledger)
        assert not list(ledger.glob("*"))
        return hashes, data

    local, data = steps()
    for index in (tmp_path / "data").rglob("index-*"):
        shutil.rmtree(index)
    as_remote(tmp_path / "data", base, tmp_path / "served")
    if cached:
        cfg.data.remote_cache = str(tmp_path / "cache")
    far, far_data = steps()
    assert far == local
    assert far_data.index.rows.drop_columns(["shard"]) == data.index.rows.drop_columns(["shard"])
    assert handler.failures > 5
    before = handler.requests
    if cached:
        assert steps()[0] == local
        assert handler.requests == before  # all of it was kept
        assert (
            open_data(cfg, tokenizer_dir=tokenizer_dir, held_out=False, build=False).index.num_samples == 37
        )


def test_ranges_of_any_file_system():
    data = os.urandom(100_000)
    fsspec.filesystem("memory").pipe_file("/far/a.tar", data)
    assert remote_size("memory://far/a.tar") == 100_000
    assert read_range("memory://far/a.tar", 70, 900) == data[70:970]
    with pytest.raises(RemoteError, match="10 bytes came, 20 were asked for"):
        read_range("memory://far/a.tar", 99_990, 20)
    with pytest.raises(RemoteError, match="FileNotFoundError"):
        read_range("memory://far/none.tar", 0, 1)


def test_a_whole_file_is_fetched_by_ranges_and_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FETCH_BYTES", 30_000)
    data = os.urandom(100_000)
    fsspec.filesystem("memory").pipe_file("/far/b.tar", data)
    with fetched("memory://far/b.tar", tmp_path) as path:
        assert path.read_bytes() == data
    assert not list(tmp_path.iterdir())


def test_the_cache_keeps_its_bound_and_what_was_used_last(tmp_path, monkeypatch):
    monkeypatch.setattr(random, "random", lambda: 0.0)
    cache = RangeCache(tmp_path / "cache", 10_000)
    for number in range(30):
        cache.put(f"{number}", bytes([number]) * 1000)
        os.utime(tmp_path / "cache" / f"{number}", ns=(number, number))
        assert cache.get("0") is None or cache.get("0") == bytes(1000)
        assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 10_000
    assert cache.get("0") is not None  # asked for all the time
    assert cache.get("3") is None
    assert cache.get("29") == bytes([29]) * 1000


def test_a_list_with_two_shards_of_one_name_is_refused(tmp_path):
    (tmp_path / "shards.txt").write_text("s3://a/x.tar\ns3://b/x.tar\n")
    with pytest.raises(ValueError, match=r"line 2: a shard named x\.tar is there already"):
        remote.listed_shards(tmp_path)


class Stalling(http.server.BaseHTTPRequestHandler):
    """Answers the first requests with half of what was asked for, and then with nothing, for as long as it lives."""

    stalls = 0
    over = threading.Event()

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.send_response(206)
        self.send_header("Content-Range", "bytes 0-9/10")
        self.send_header("Content-Length", "10")
        self.end_headers()
        self.wfile.write(b"01234")
        self.wfile.flush()
        if type(self).stalls:
            type(self).stalls -= 1
            self.over.wait(60)
            return
        self.wfile.write(b"56789")


@pytest.fixture
def stalling():
    pytest.importorskip("aiohttp")
    handler = type("Handler", (Stalling,), {"over": threading.Event()})
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_address[1]}/a.tar", handler
    handler.over.set()
    served.shutdown()


def test_a_connection_that_stalls_is_tried_again(stalling, monkeypatch):
    url, handler = stalling
    monkeypatch.setattr(remote, "TRY_SECONDS", 0.3)
    handler.stalls = 2
    began = time.monotonic()
    assert read_range(url, 0, 10) == b"0123456789"
    assert 0.6 < time.monotonic() - began < 10
    assert handler.stalls == 0


def test_one_that_always_stalls_is_an_error_that_says_so(stalling, monkeypatch):
    url, handler = stalling
    monkeypatch.setattr(remote, "TRY_SECONDS", 0.1)
    monkeypatch.setattr(remote, "ATTEMPTS", 3)
    handler.stalls = 9
    with pytest.raises(RemoteError, match=r"after 3 tries: TimeoutError: no answer within 0\.1 s"):
        read_range(url, 0, 10)
    assert handler.stalls == 6


def test_a_file_system_without_cancelling_is_left_behind(monkeypatch):
    class Hanging(fsspec.AbstractFileSystem):
        protocol = "hanging"

        def cat_file(self, path, start=None, end=None, **kwargs):
            if path.endswith("gone"):
                raise FileNotFoundError(path)
            return b"x" * (end - start) if path.endswith("fine") else threading.Event().wait(60)

    fsspec.register_implementation("hanging", Hanging, clobber=True)
    monkeypatch.setattr(remote, "TRY_SECONDS", 0.1)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    assert read_range("hanging://fine", 2, 5) == b"xxxxx"
    with pytest.raises(RemoteError, match="no answer within"):
        read_range("hanging://slow", 0, 5)
    with pytest.raises(RemoteError, match="FileNotFoundError"):
        read_range("hanging://gone", 0, 5)
