"""Answers over HTTP are those of `vl3train generate`, whole and in pieces, alone and among others."""

from __future__ import annotations

import http.client
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.inference.asked import requests_on
from tests.serving.conftest import as_data_url, ask, said, served
from vl3train.inference.requests import Request


def as_body(request, **options):
    media = [("image", as_data_url(path)) for path in request.images]
    media += [("video", as_data_url(path)) for path in request.videos]
    body = said(request.prompt, *media, max_tokens=12, **options)
    if request.system is not None:
        body["messages"].insert(0, {"role": "system", "content": request.system})
    return body


def content(answer):
    status, body = answer
    assert status == 200, body
    return body["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def expected(lively_model_dir, media):
    from vl3train.inference.answer import Asker

    return Asker.load(lively_model_dir, device="cpu", max_new_tokens=12).answers(requests_on(media))


def test_each_kind_of_question_is_answered_as_generate_does(address, media, expected):
    bodies = [as_body(request) for request in requests_on(media)]
    assert [content(ask(address, body)) for body in bodies] == expected
    with ThreadPoolExecutor(8) as pool:  # together, and twice
        assert [content(one) for one in pool.map(lambda body: ask(address, body), bodies * 2)] == expected * 2


def test_tokens_are_counted_and_the_reason_of_the_end_is_told(address, media, served_asker):
    body = as_body(requests_on(media)[2])
    _, found = ask(address, body)
    assert found["object"] == "chat.completion"
    assert found["model"] == "small"
    assert found["choices"][0]["finish_reason"] == "length"
    usage = found["usage"]
    assert usage["completion_tokens"] == 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12
    _, without = ask(
        address, {**body, "messages": body["messages"][:1] + said("Describe the video.")["messages"]}
    )
    assert usage["prompt_tokens"] > without["usage"]["prompt_tokens"]
    text = content((200, found))
    _, stopped = ask(address, {**body, "stop": ["never", text[4:6]]})
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert content((200, stopped)) == text.partition(text[4:6])[0].rstrip()


def test_a_stream_is_the_answer_in_pieces(address, media, expected):
    connection = http.client.HTTPConnection(address, timeout=60)
    body = as_body(requests_on(media)[1], stream=True, stream_options={"include_usage": True})
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.headers["Content-Type"] == "text/event-stream"
    lines = response.read().decode().split("\n\n")
    connection.close()
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == expected[1]
    assert sum("content" in delta for delta in deltas) > 3
    assert [event["choices"][0]["finish_reason"] for event in events if event["choices"]][-1] == "length"
    assert events[-1]["usage"]["completion_tokens"] == 12
    assert len({event["id"] for event in events}) == 1


def test_earlier_turns_are_part_of_the_question(address):
    turns = [("user", "How many?"), ("assistant", "Three."), ("user", "What is the capital of France?")]
    whole = {"messages": [{"role": role, "content": text} for role, text in turns], "max_tokens": 12}
    last = {"messages": whole["messages"][-1:], "max_tokens": 12}
    found, alone = ask(address, whole), ask(address, last)
    assert content(found) != content(alone)
    assert found[1]["usage"]["prompt_tokens"] > alone[1]["usage"]["prompt_tokens"] + 8


def test_drawn_answers_differ_and_a_seed_draws_them_again(address):
    hot = said("How many?", temperature=2.0, max_tokens=12)
    assert len({content(ask(address, hot)) for _ in range(4)}) > 1
    with ThreadPoolExecutor(6) as pool:  # whoever else asks at the same time
        bodies = [
            {**hot, "seed": 7},
            hot,
            said("x", max_tokens=12),
            {**hot, "seed": 7},
            hot,
            {**hot, "seed": 8},
        ]
        found = [content(one) for one in pool.map(lambda body: ask(address, body), bodies)]
    assert found[0] == found[3] == content(ask(address, {**hot, "seed": 7})) != found[5]
    cold = said("How many?", temperature=1.0, top_k=1, max_tokens=12)
    assert content(ask(address, cold)) == content(ask(address, said("How many?", max_tokens=12)))


def test_a_part_of_a_clip_at_another_rate(address, media, served_asker):
    def tokens(**fields):
        part = {"type": "video_url", "video_url": {"url": "long.mp4", **fields}}
        body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
        return ask(address, body)[1]["usage"]["prompt_tokens"]

    assert tokens(start=1, end=3) < tokens() < tokens(fps=4)


def test_files_below_the_root_are_read_and_shown_like_others(address, media, expected):
    request = requests_on(media)[1]
    assert content(ask(address, said(request.prompt, ("image", "a.jpg"), max_tokens=12))) == expected[1]
    assert content(ask(address, said(request.prompt, ("image", "file:a.jpg"), max_tokens=12))) == expected[1]


def test_whoever_leaves_frees_the_place(served_asker):
    """A client that closes the connection ends its answer: the next one does not wait for its tokens."""
    with served({"small": served_asker}, num_slots=1, max_new_tokens=64) as address:
        body = json.dumps(said("How many?", stream=True, max_tokens=64)).encode()
        host, port = address.split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = (
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
            )
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        deadline = time.monotonic() + 30
        while ask(address, None, "/health", "GET")[1]["in_progress"] and time.monotonic() < deadline:
            time.sleep(0.02)
        assert ask(address, None, "/health", "GET")[1] == {"status": "ok", "in_progress": 0, "waiting": 0}


def test_two_models_answer_by_their_names(served_asker, lively_model_dir):
    from vl3train.inference.answer import Asker

    other = Asker.load(lively_model_dir, device="cpu", max_new_tokens=3)
    with served({"one": served_asker, "two": other}) as address:
        bodies = [said("How many?", model=name) for name in ("one", "two", "one", "two")]
        with ThreadPoolExecutor(4) as pool:
            found = [body for _, body in pool.map(lambda body: ask(address, body), bodies)]
        assert [one["model"] for one in found] == ["one", "two", "one", "two"]
        assert [one["usage"]["completion_tokens"] for one in found][1::2] == [3, 3]
        assert found[0]["choices"][0]["message"]["content"].startswith(
            found[1]["choices"][0]["message"]["content"]
        )
        _, models = ask(address, None, "/v1/models", "GET")
        assert [one["id"] for one in models["data"]] == ["one", "two"]


def test_the_openai_client_finds_what_it_expects(address, media, expected):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://{address}/v1", api_key="none")
    (model,) = client.models.list().data
    assert (model.id, client.models.retrieve(model.id).id) == ("small", "small")
    request = requests_on(media)[1]
    messages = as_body(request)["messages"]
    answer = client.chat.completions.create(model=model.id, messages=messages, max_tokens=12, temperature=0)
    assert answer.choices[0].message.content == expected[1]
    assert answer.usage.completion_tokens == 12
    pieces = client.chat.completions.create(
        model=model.id, messages=messages, max_completion_tokens=12, stream=True
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected[1]
    with pytest.raises(openai.NotFoundError, match="no model other is served here; there is small"):
        client.chat.completions.create(model="other", messages=messages)
    with pytest.raises(openai.BadRequestError, match="n can only be left out") as caught:
        client.chat.completions.create(model=model.id, messages=messages, n=3)
    assert caught.value.param == "n"


def test_a_failure_of_the_engine_is_told_and_the_next_question_answered(served_asker, monkeypatch):
    from vl3train.inference import answering

    make = answering.Generator.answers

    def failing(self, batches, *rest):
        for batch in batches:
            if batch is not None and batch.segment_lengths[0] > 60:
                raise MemoryError("planted")
            yield from make(self, iter([batch]), *rest)

    monkeypatch.setattr(answering.Generator, "answers", failing)
    with served({"small": served_asker}) as address:
        status, body = ask(address, said("How many? " * 30))
        assert (status, body["error"]["type"]) == (500, "server_error")
        assert "MemoryError" in body["error"]["message"]
        assert content(ask(address, said("How many?", max_tokens=3)))


def test_a_request_is_that_of_generate(served_asker, media):
    """What `Request` and a chat message make of the same media is the same sample."""
    from vl3train.inference.requests import as_question
    from vl3train.serving.incoming.chat_request import read_chat_request

    request = Request(
        prompt="x", images=(media / "a.jpg",), videos=(media / "short.mp4",), system="Be brief."
    )
    turns = read_chat_request(json.dumps(as_body(request)).encode()).turns
    ours = as_question(request).turns
    assert [(turn.role, [one.type for one in turn.content]) for turn in turns] == [
        (turn.role, [one.type for one in turn.content]) for turn in ours
    ]
