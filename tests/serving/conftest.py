"""A real server over the small model, in a thread of this process."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import json
import threading
from pathlib import Path

import pytest

from tests.inference.asked import draw_media
from vl3train.inference.answer import Asker
from vl3train.serving.app import running
from vl3train.serving.incoming.options import ServingOptions


@contextlib.contextmanager
def served(askers, **options):
    """Host and port of a server for the ``with`` block."""
    loop, started, ended = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    found: dict[str, object] = {}

    async def run():
        try:
            async with running(askers, ServingOptions(port=0, **options), lambda line: None) as address:
                found["address"] = address
                started.set()
                await ended.wait()
        except BaseException as error:
            found["error"] = error
        finally:
            started.set()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    started.wait()
    try:
        if "error" in found:
            raise found["error"]
        yield str(found["address"]).removeprefix("http://")
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(20)
        assert not thread.is_alive(), "the server does not end"
        loop.close()


@pytest.fixture(scope="session")
def served_asker(lively_model_dir):
    return Asker.load(lively_model_dir, device="cpu", max_new_tokens=64)


@pytest.fixture(scope="session")
def media(tmp_path_factory):
    return draw_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="session")
def address(served_asker, media):
    """A server that may read files of ``media``."""
    with served({"small": served_asker}, media_root=media) as address:
        yield address


def ask(address, body, path="/v1/chat/completions", method="POST", **headers):
    """Status and parsed body of a request with the standard library."""
    connection = http.client.HTTPConnection(address, timeout=60)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    sent = {
        "Content-Type": "application/json",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    try:
        connection.request(method, path, body=data, headers=sent)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def said(text, *media, **options):
    """A request: a user's message with media, as (kind, address)."""
    parts = [{"type": f"{kind}_url", f"{kind}_url": {"url": url}} for kind, url in media]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], **options}


def as_data_url(path: Path) -> str:
    return f"data:application/octet-stream;base64,{base64.b64encode(path.read_bytes()).decode()}"
