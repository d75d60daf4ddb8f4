"""Nobody comes in who should not, nothing goes out that should not, and errors are told as OpenAI's."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.server
import io
import os
import socket
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.serving.conftest import as_data_url, ask, said, served
from vl3train.data.media.clips import DecodeLimits
from vl3train.serving.incoming import fetching
from vl3train.serving.incoming.options import ServingOptions


def refused(address, body, status=400, **headers):
    """The error of a request."""
    found, answer = ask(address, body, **headers)
    assert found == status, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    return answer["error"]


def test_only_this_machine_is_listened_to_unless_asked(address):
    assert ServingOptions().is_local
    assert address.startswith("127.0.0.1:")
    assert not ServingOptions(host="0.0.0.0").is_local


def test_pages_of_others_may_not_ask(address):
    """A page in the user's browser can send requests here; the browser says from where, or the name is not ours."""
    body, port = said("How many?", max_tokens=1), address.split(":")[1]
    assert "may not ask" in refused(address, body, 403, Origin="https://evil.example")["message"]
    assert "may not ask" in refused(address, body, 403, Origin="null")["message"]
    assert "'evil.example:80'" in refused(address, body, 403, Host="evil.example:80")["message"]
    assert "Content-Type" in refused(address, body, 415, Content_Type="text/plain")["message"]
    for host in (f"localhost:{port}", f"127.0.0.1:{port}"):
        assert ask(address, body, Host=host, Origin=f"http://{host}")[0] == 200
    options = ServingOptions(names=("proxy.example",))
    assert [options.knows(name) for name in ("proxy.example:443", "[::1]:80", "::1", "x.localhost", "")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    assert ServingOptions(host="0.0.0.0").knows("any.name:80")


@pytest.fixture
def folder(tmp_path):
    """A media root with a picture, beside a picture that is outside."""
    root = tmp_path / "root"
    (root / "below").mkdir(parents=True)
    picture = io.BytesIO()
    Image.new("RGB", (40, 40)).save(picture, "PNG")
    for path in (root / "below" / "in.png", tmp_path / "out.png"):
        path.write_bytes(picture.getvalue())
    (root / "link.png").symlink_to(tmp_path / "out.png")
    (root / "linked").symlink_to(tmp_path)
    (root / "loop").symlink_to(root / "loop")
    (root / "inner.png").symlink_to(root / "below" / "in.png")
    os.mkfifo(root / "pipe.png")
    return root


def test_files_outside_the_root_are_not_read_nor_told_of(served_asker, folder):
    with served({"small": served_asker}, media_root=folder, max_media_bytes=2000) as address:
        for name in ("below/in.png", "inner.png", "below/../below/in.png", str(folder / "below" / "in.png")):
            assert ask(address, said("x", ("image", name), max_tokens=1))[0] == 200
        (folder / "large.png").write_bytes(b"x" * 2001)
        assert refused(address, said("x", ("image", "large.png")), 413)["param"] == "messages[0][0] image"
        outside = ["../out.png", "link.png", "linked/out.png", str(folder.parent / "out.png"), "/etc/passwd"]
        outside += [
            "file:///etc/passwd",
            "file:%2e%2e/out.png",
            "below",
            "pipe.png",
            "loop",
            "a\0b",
            "gone.png",
        ]
        outside += [".", "", "below/in.png/x", "x" * 5000]
        for name in outside:
            message = refused(address, said("x", ("image", name)))["message"]
            assert message.startswith("messages[0][0] image: there is no file"), name


def test_no_files_are_read_without_a_root(served_asker, folder):
    with served({"small": served_asker}) as address:
        for name in ("a.png", str(folder / "below" / "in.png"), f"file://{folder}/below/in.png"):
            assert "this server reads no files" in refused(address, said("x", ("image", name)))["message"]


@contextlib.contextmanager
def listening(respond):
    """Port of a web server of 127.0.0.1 and 127.0.0.2, and the paths that it was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.headers["Host"], self.path))
            respond(self)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("0.0.0.0", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port, asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def picture(handler):
    data = io.BytesIO()
    Image.new("RGB", (40, 40)).save(data, "PNG")
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(data.getvalue())


def test_nothing_is_fetched_unless_asked_and_never_from_here(served_asker):
    names = (
        "127.0.0.1",
        "localhost",
        "127.0.0.2",
        "2130706433",
        "0x7f.1",
        "0.0.0.0",
        "[::1]",
        "[::ffff:127.0.0.1]",
    )
    with listening(picture) as (port, asked):
        with served({"small": served_asker}) as address:
            for url in (f"http://127.0.0.1:{port}/a.png", "https://example.com/a.png"):
                assert "fetches nothing" in refused(address, said("x", ("image", url)))["message"]
        with served({"small": served_asker}, allow_urls=True, read_seconds=5) as address:
            for name in names:
                error = refused(address, said("x", ("image", f"http://{name}:{port}/a.png")))
                told = error["message"].removeprefix("messages[0][0] image")
                # aiohttp itself refuses numbers that are no IP address in full.
                assert told.startswith((": the address is not public", " cannot be fetched: InvalidUrl")), (
                    name
                )
            for url in (
                f"http://user:pw@127.0.0.1:{port}/",
                "ftp://example.com/a.png",
                "http://",
                "http://[x]/",
            ):
                refused(address, said("x", ("image", url)))
    assert asked == []


def test_private_addresses_are_known():
    private = [
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "127.8.8.8",
        "0.0.0.0",
    ]
    private += [
        "255.255.255.255",
        "224.0.0.1",
        "::",
        "::1",
        "fe80::1%eth0",
        "fd00::1",
        "ff02::1",
        "2002:7f00:1::",
    ]
    private += ["::ffff:192.168.0.1", "64:ff9b::a00:1", "2001:db8::1"]
    assert [one for one in private if fetching.is_public(one)] == []
    assert all(map(fetching.is_public, ["1.1.1.1", "2606:4700:4700::1111", "64:ff9b::808:808"]))


def test_what_is_fetched_has_limits_and_a_redirect_leads_to_no_other_place(served_asker, monkeypatch):
    """127.0.0.1 stands for the public internet here, 127.0.0.2 for what is behind the wall."""
    monkeypatch.setattr(fetching, "is_public", lambda address: _is_ip(address) and address == "127.0.0.1")

    told = threading.Event()

    def respond(handler):
        kind = handler.path.strip("/")
        if kind in ("inside", "again"):
            handler.send_response(302)
            place = f"http://127.0.0.2:{port}/a.png" if kind == "inside" else "/again"
            handler.send_header("Location", place)
            handler.end_headers()
        elif kind == "large":
            handler.send_response(200)
            handler.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(100):
                    handler.wfile.write(b"x" * 2**16)
        elif kind == "slow":
            handler.send_response(200)
            handler.end_headers()
            told.wait(60)
        elif kind == "gone":
            handler.send_error(404)
        else:
            picture(handler)

    limits = {"allow_urls": True, "max_media_bytes": 2**20}
    with (
        listening(respond) as (port, asked),
        served({"small": served_asker}, **limits) as address,
        served({"small": served_asker}, **limits, read_seconds=0.3) as hasty,
    ):

        def fetched(kind):
            return said("x", ("image", f"http://127.0.0.1:{port}/{kind}"), max_tokens=1)

        assert "not fetched within 0.3 s" in refused(hasty, fetched("slow"))["message"]
        told.set()
        assert ask(address, fetched("a.png"))[0] == 200
        assert "not public" in refused(address, fetched("inside"))["message"]
        assert "more than 3 redirects" in refused(address, fetched("again"))["message"]
        assert "larger than the 1 MiB" in refused(address, fetched("large"), 413)["message"]
        assert "its server answers 404" in refused(address, fetched("gone"))["message"]
    assert {host.split(":")[0] for host, _ in asked} == {"127.0.0.1"}


def _is_ip(text):
    try:
        socket.inet_aton(text)
    except OSError:
        raise ValueError(text) from None
    return True


def test_too_much_and_too_many_and_too_slow_are_refused(served_asker, media):
    url = as_data_url(media / "a.jpg")
    size = (media / "a.jpg").stat().st_size
    with served({"small": served_asker}, max_media_bytes=size) as address:
        assert ask(address, said("x", ("image", url), max_tokens=1))[0] == 200
        both = refused(address, said("x", ("image", url), ("image", url)), 413)
        assert both["param"] == "messages[0][1] image"
        assert "MiB of media" in refused(address, b" " * (size * 4 // 3 + 2**20 + 1), 413)["message"]
    with served({"small": served_asker}, num_slots=1, max_waiting=0) as address, unfinished(address):
        deadline = time.monotonic() + 60
        while (found := ask(address, said("x", max_tokens=1)))[0] == 200 and time.monotonic() < deadline:
            pass  # the request before is on its way
        assert found[0] == 429
        assert found[1]["error"]["type"] == "rate_limit_error"
    with served({"small": served_asker}, read_seconds=0.1) as address, unfinished(address) as slow:
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


@contextlib.contextmanager
def unfinished(address):
    """A connection with a request whose body does not come."""
    host, port = address.split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        yield connection


def test_files_are_decoded_with_the_limits_of_training(served_asker, media):
    rendering = served_asker.rendering
    small = DecodeLimits(max_pixels=5000, max_seconds=3)
    limited = dataclasses.replace(served_asker, rendering=dataclasses.replace(rendering, limits=small))
    small_picture = io.BytesIO()
    Image.new("RGB", (40, 40)).save(small_picture, "PNG")
    small_url = f"data:;base64,{base64.b64encode(small_picture.getvalue()).decode()}"
    cut = f"data:;base64,{base64.b64encode((media / 'a.jpg').read_bytes()[:-300]).decode()}"
    with served({"small": limited}) as address:
        told = [
            refused(address, said("x", (kind, url)))["message"]
            for kind, url in (
                ("image", as_data_url(media / "a.jpg")),
                ("video", as_data_url(media / "long.mp4")),
                ("image", cut),
                ("video", "data:;base64,AAAA"),
                ("image", "data:;base64,"),
            )
        ]
        of_two = refused(address, said("x", ("image", small_url), ("image", cut)))["message"]
    assert "messages[0][1] image: image of" in of_two
    assert "90x61 = 5490 pixels is over data.decode_max_pixels=5000" in told[0]
    assert "5000" in told[1] or "3" in told[1]
    assert all(told)
    slow = dataclasses.replace(served_asker, rendering=dataclasses.replace(rendering, decode_seconds=1e-4))
    with served({"small": slow}) as address:
        message = refused(address, said("x", ("video", as_data_url(media / "long.mp4"))))["message"]
    assert "decoding took longer than" in message


def test_a_prompt_that_leaves_no_room_is_refused(served_asker):
    with served({"small": served_asker}) as address:
        error = refused(address, said("many words " * 4000))
        assert error["code"] == "context_length_exceeded"
        assert "more than the 4096" in error["message"]
        assert "at most 64 tokens" in refused(address, said("x", max_tokens=65))["message"]


def test_everything_that_is_wrong_is_told_at_once(address):
    body = {
        "messages": [
            {"role": "tool", "content": "x"},
            {"role": "system", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},
            {
                "role": "user",
                "content": [{"type": "input_audio"}, {"type": "text", "text": "see <|image_pad|>"}],
            },
            {
                "role": "user",
                "content": [{"type": "video_url", "video_url": {"url": "a", "fps": 0, "speed": 2}}],
            },
            {"role": "assistant", "content": "half \ud83d"},
        ],
        "temperature": 3,
        "top_p": 0,
        "max_tokens": "many",
        "n": 2,
        "stop": [""],
        "stream": "yes",
        "temprature": 1,
        "response_format": {"type": "json_object"},
    }
    message = refused(address, body)["message"]
    for text in (
        "messages[0] has no role of system, developer, user, assistant",
        "messages[1].content[0] holds a medium, and only the user's messages may",
        "messages[2].content[0] has no type of text, image_url, video_url",
        "messages[2].content[1] holds <|image_pad|>",
        "messages[3].content[0].speed is not known here",
        "messages[3].content[0].video_url.fps must be a number, 0 or more, not 0, and less than 1e9",
        "messages[4].content[0] 'half \\ud83d' holds half a character",
        "messages[4] is not the user's",
        "temperature must be a number, 0 or more, and at most 2",
        "top_p must be",
        "max_tokens must be a whole number",
        "n can only be left out",
        "stop is neither",
        "stream is neither",
        "temprature is not known here",
        "response_format can only be left out",
    ):
        assert text in message


def test_other_mistakes_have_the_same_shape(address):
    assert "no JSON" in refused(address, b"{not json")["message"]
    assert "no JSON object" in refused(address, b"[1]")["message"]
    assert "is no list of messages" in refused(address, {})["message"]
    assert refused(address, said("x", model="other"), 404)["code"] == "model_not_found"
    for path, method, status in (("/v1/completions", "POST", 404), ("/v1/chat/completions", "GET", 405)):
        found, body = ask(address, None, path, method)
        assert found == status
        assert "message" in body["error"]
    deep = b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    refused(address, deep)


def test_options_out_of_range_are_told_together():
    with pytest.raises(
        ValueError, match=r"max_media_bytes=0 .*num_slots=0 .*port=70000 .*media_root=/nowhere"
    ):
        ServingOptions(max_media_bytes=0, num_slots=0, port=70000, media_root=Path("/nowhere"))
