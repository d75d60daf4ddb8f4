"""A signed address opens a file: requests have it whole, nothing else has more of it than the place."""

from __future__ import annotations

import base64
import doctest
import http.server
import os
import re
import threading
import traceback
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

import vl3train.data.shards.addresses as addresses
from tests.data.shards.test_remote import as_remote
from tests.data.shards_fixture import make_source, train_config
from vl3train.contracts.records import SampleError
from vl3train.contracts.redaction import shown_address, without_secrets
from vl3train.data.pipeline import open_data
from vl3train.data.shards import remote
from vl3train.data.shards.addresses import address_problem, shard_name
from vl3train.data.shards.manifest import MissingIndexError
from vl3train.data.shards.remote import RemoteError, listed_shards, read_range

KEY = "s3cr3t%2Fs1gn4tur3%3D%3D"
SIGNED = (
    f"https://host/set/a.tar?X-Amz-Date=20261130T100000Z&X-Amz-Signature={KEY}",
    f"https://user:{KEY}@host:8443/set/a.tar",
    f"https://host/set/a.tar?{KEY}",
    f"https://host/set/a.tar?sv=2024-08-04&sig={KEY}#part",
    f"s3://{KEY}@bucket/set/a.tar?versionId=7",
    f"https://host/set/a.tar?generation=7&token={KEY}",
    f"abfss://container:{KEY}@account/set/a.tar",
)


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(addresses).failed == 0


@pytest.mark.parametrize("address", SIGNED)
def test_what_is_shown_holds_no_key_and_names_the_place(address):
    shown = shown_address(address)
    assert shard_name(address) == "a.tar"
    assert "/set/a.tar" in shown
    assert not re.search(r"s3cr3t|user|sig|token|Amz", shown, re.IGNORECASE)
    assert shown_address(shown) == shown
    assert ("7" in shown) == ("=7" in address)


@pytest.mark.parametrize("address", SIGNED)
@pytest.mark.parametrize(
    "form",
    [
        "{}",
        "404, message='Not Found', url=URL('{}')",
        "Max retries exceeded with url: {path}",
        "<Error>({}), try again; see https://other/page?x=1",
        "decoded {decoded}",
        "moved to https://me:s3cr3t-other@cdn/a.tar?x=1, then (https://cdn/b.tar?Signature=s3cr3t-third)",
        "headers: {{'Authorization': 'Basic {basic}'}}",
    ],
)
def test_a_librarys_message_is_shown_without_the_key(address, form):
    parts = urlsplit(address)
    user = unquote(parts.netloc.rpartition("@")[0])
    text = form.format(
        address,
        path=f"{parts.path}?{parts.query}",
        decoded=unquote(address),
        basic=base64.b64encode(user.encode()).decode(),
    )
    said = without_secrets(text, address)
    assert "s3cr3t" not in said
    if user and not address.startswith("abfss"):
        assert base64.b64encode(user.encode()).decode() not in said


def test_a_message_without_an_address_stays_as_it_is():
    text = "404, message='Not Found': is it there? Ask (or wait); 3 of 4 bytes"
    assert without_secrets(text, SIGNED[0]) == text


def test_with_another_signature_it_is_the_same_shard_and_with_another_version_another():
    def shown(query):
        return shown_address(f"https://host/a.tar?{query}")

    assert shown("sig=1&versionId=a") == shown("versionId=a&sig=2&expires=9")
    assert shown("versionId=a") != shown("versionId=b")
    assert shown_address("abfss://one@account/a.tar") != shown_address("abfss://two@account/a.tar")


@pytest.mark.parametrize(
    "line",
    [
        "/data/a.tar",
        "a.tar",
        "../a.tar",
        "file:///data/a.tar",
        "local:///data/a.tar",
        "simplecache::https://host/a.tar",
        "zip://a.tar::https://host/a.zip",
        "reference://a.tar",
        "https://host/",
        "https://host/..",
        "https://host/set/.?x=1",
        "https://host/a\\b.tar",
        f"https://host/{'a' * 300}.tar",
    ],
)
def test_a_line_that_names_no_remote_shard_is_refused_with_its_number(tmp_path, line):
    assert address_problem(line) is not None
    (tmp_path / "shards.txt").write_text(f"# a list\ns3://bucket/a-0.tar\n{line}?sig={KEY}\nno_address\n")
    with pytest.raises(ValueError, match=r"line 3: ") as raised:
        listed_shards(tmp_path)
    assert "line 4: it is no address" in str(raised.value)
    assert KEY not in str(raised.value)


class Signed(http.server.SimpleHTTPRequestHandler):
    """Files for those who have today's signature."""

    today: str

    def log_message(self, *args):
        pass

    def send_head(self):
        if parse_qs(urlsplit(self.path).query).get("sig") != [type(self).today]:
            self.send_error(403)
            return None
        return super().send_head()

    def do_GET(self):
        if parse_qs(urlsplit(self.path).query).get("sig") != [type(self).today]:
            self.send_error(403)
            return
        with open(self.translate_path(self.path), "rb") as file:
            data = file.read()
        whole = len(data)
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        data = data[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{whole}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def signed(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)
    served = tmp_path / "served"
    served.mkdir()
    handler = type("Handler", (Signed,), {"today": "monday-s3cr3t"})

    def handle(*args):
        return handler(*args, directory=str(served))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handle)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler, served
    server.shutdown()
    thread.join()


def sign(root, signature):
    for file in root.rglob("shards.txt"):
        text = file.read_text()
        file.write_text(re.sub(r"(\.tar).*", rf"\1?sig={signature}", text))
        os.utime(file, ns=(1, hash(signature) % 10**12))


def test_an_index_outlives_the_signature_and_no_file_of_it_holds_one(tmp_path, tokenizer_dir, signed):
    base, handler, served = signed
    root = tmp_path / "data"
    make_source(root / "words", images=0, clips=0, texts=3, seed=1)
    recipe = root / "recipe.yaml"
    recipe.write_text("name: words\nabout: words\nsources:\n- {name: words, shards: words/shards}\n")
    cfg = train_config(root, recipe)
    cfg.data.remote_cache = str(tmp_path / "cache")
    as_remote(root, base, served)
    sign(root, "sunday-s3cr3t")
    with pytest.raises((RemoteError, MissingIndexError), match="signature may have expired") as refused:
        open_data(cfg, tokenizer_dir=tokenizer_dir, held_out=False, build=True)
    assert "s3cr3t" not in str(refused.value)
    sign(root, "monday-s3cr3t")
    open_data(cfg, tokenizer_dir=tokenizer_dir, held_out=False, build=True)

    handler.today = "tuesday-s3cr3t"
    sign(root, "tuesday-s3cr3t")
    data = open_data(cfg, tokenizer_dir=tokenizer_dir, held_out=False, build=False)
    assert data.index.read_sample(0)
    handler.today = "wednesday-s3cr3t"
    with pytest.raises(SampleError, match=r"\.tar.*signature may have expired") as raised:
        data.index.read_sample(1)
    assert "s3cr3t" not in str(raised.value)
    assert data.index.read_sample(0)  # kept, whatever the signature
    for file in tmp_path.rglob("*"):
        assert "s3cr3t" not in file.name
        if file.is_file() and file.name != "shards.txt":
            assert b"s3cr3t" not in file.read_bytes(), file


def test_an_error_shows_no_key_also_where_nobody_catches_it(signed):
    address = f"{signed[0]}/none.tar?sig=old-s3cr3t"
    with pytest.raises(RemoteError) as raised:
        read_range(address, 0, 1)
    assert "s3cr3t" not in "".join(traceback.format_exception(raised.value))
    assert f"{shown_address(address)} bytes 0 to 1" in str(raised.value)
