"""A request of OpenAI's chat API: what it asks for, or everything that is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vl3train.contracts.tokens import RESERVED_TOKENS
from vl3train.data.records.conversation import Content, Image, Text, Turn, Video, half_character
from vl3train.model.generation.sampling import GREEDY, Sampling
from vl3train.serving.incoming.errors import ApiError

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
KINDS = {"image_url": ("image_url", "detail"), "video_url": ("video_url", "start", "end", "fps")}
"""Kinds of media, each with the keys of its part: the first names the medium."""

ONE_VALUE: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "store": (False,),
    "parallel_tool_calls": (False, True),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
}
"""Options of the API that this server does not have, with the values that change nothing."""

WITHOUT_MEANING = ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key")
"""Options that say nothing about the answer."""

RANGES: Mapping[str, tuple[Any, float, float]] = {
    "temperature": ((int, float), 0, 2),
    "top_p": ((int, float), 1e-6, 1),
    "top_k": (int, 0, 10**9),
    "seed": (int, -(2**63), 2**63 - 1),
    "max_tokens": (int, 1, 10**9),
    "max_completion_tokens": (int, 1, 10**9),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """What is asked. ``turns`` name media by the keys of ``media``."""

    model: str | None
    turns: tuple[Turn, ...]
    media: Mapping[str, str]  # part -> address: a data: or http(s) URL, or a path
    sampling: Sampling
    seed: int | None
    max_tokens: int | None
    stops: tuple[str, ...]
    stream: bool
    stream_usage: bool


def read_chat_request(data: bytes) -> ChatRequest:
    """Raises ApiError that names everything that is wrong; its ``param`` is the first of it."""
    reading = _Reading()
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body is no JSON object")
    turns = reading.turns(body.get("messages"))
    numbers = {name: reading.number(body, name) for name in RANGES}
    sampling = Sampling(
        temperature=numbers["temperature"] or 0.0,
        top_p=numbers["top_p"] or 1.0,
        top_k=numbers["top_k"] or 0,
    )
    stops = body.get("stop")
    stops = [] if stops is None else [stops] if isinstance(stops, str) else stops
    if (
        not isinstance(stops, list)
        or len(stops) > 16
        or not all(isinstance(one, str) and one for one in stops)
    ):
        reading.wrong("stop", "is neither a text nor a list of up to 16 texts")
        stops = []
    model, stream = body.get("model"), body.get("stream")
    if model is not None and not isinstance(model, str):
        reading.wrong("model", "is no text")
    if stream not in (None, True, False):
        reading.wrong("stream", "is neither true nor false")
    options = body.get("stream_options")
    if options is not None and not (isinstance(options, dict) and set(options) <= {"include_usage"}):
        reading.wrong("stream_options", "may hold include_usage only")
        options = None
    reading.refuse_others(body)
    reading.finish()
    return ChatRequest(
        model=model,
        turns=turns,
        media=reading.media,
        sampling=sampling if sampling.temperature else GREEDY,
        seed=numbers["seed"] if sampling.temperature else None,
        max_tokens=numbers["max_completion_tokens"] or numbers["max_tokens"],
        stops=tuple(stops),
        stream=bool(stream),
        stream_usage=bool((options or {}).get("include_usage")),
    )


@dataclass(slots=True)
class _Reading:
    """What was read so far, and what was wrong with it."""

    media: dict[str, str] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def wrong(self, param: str, what: str) -> None:
        self.problems.append((param, what))

    def finish(self) -> None:
        if self.problems:
            message = "; ".join(f"{param} {what}" for param, what in self.problems)
            raise ApiError(400, message, param=self.problems[0][0])

    def number(self, body: Mapping[str, Any], name: str) -> Any:
        value = body.get(name)
        kinds, least, most = RANGES[name]
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is None or (is_number and isinstance(value, kinds) and least <= value <= most):
            return value
        what = "a whole number" if kinds is int else "a number"
        self.wrong(
            name, f"must be {what}, {least:g} or more" + (f", and at most {most:g}" if most < 10**9 else "")
        )
        return None

    def refuse_others(self, body: Mapping[str, Any]) -> None:
        known = {"messages", "model", "stream", "stream_options", "stop", *RANGES, *WITHOUT_MEANING}
        for name, value in body.items():
            if name in known or value is None or value in ONE_VALUE.get(name, ()):
                continue
            self.wrong(
                name, "can only be left out or harmless here" if name in ONE_VALUE else "is not known here"
            )

    def turns(self, messages: Any) -> tuple[Turn, ...]:
        if not isinstance(messages, list) or not messages:
            self.wrong("messages", "is no list of messages")
            return ()
        found = [self.turn(f"messages[{number}]", message) for number, message in enumerate(messages)]
        if found[-1] is not None and found[-1].role != "user":
            self.wrong(f"messages[{len(found) - 1}]", "is not the user's: there is nothing to answer")
        return tuple(turn for turn in found if turn is not None)

    def turn(self, where: str, message: Any) -> Turn | None:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            self.wrong(where, f"has no role of {', '.join(ROLES)}")
            return None
        for key in message:
            if key not in ("role", "content", "name") and message[key] is not None:
                self.wrong(f"{where}.{key}", "is not known here")
        role, content = ROLES[message["role"]], message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not parts:
            self.wrong(f"{where}.content", "is neither a text nor a list of parts")
            return None
        found: list[Content] = []
        for number, part in enumerate(parts):
            one = self.part(f"{where}.content[{number}]", part, role)
            if isinstance(one, Text) and found and isinstance(found[-1], Text):
                found[-1] = Text(f"{found[-1].text}\n{one.text}")
            elif one is not None:
                found.append(one)
        return Turn(role, tuple(found))

    def part(self, where: str, part: Any, role: str) -> Content | None:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            return self.text(where, part["text"])
        if kind not in KINDS:
            self.wrong(where, f"has no type of text, {', '.join(KINDS)}")
            return None
        if role != "user":
            self.wrong(where, "holds a medium, and only the user's messages may")
            return None
        return self.medium(where, kind, part)

    def text(self, where: str, text: str) -> Text | None:
        if taken := [token for token in RESERVED_TOKENS if token in text]:
            self.wrong(where, f"holds {taken[0]}, a special token of the chat template; remove it")
            return None
        if reason := half_character(text):
            self.wrong(where, reason)
            return None
        return Text(text)

    def medium(self, where: str, kind: str, part: Mapping[str, Any]) -> Content | None:
        fields = part.get(kind)
        fields = {"url": fields} if isinstance(fields, str) else fields
        if not isinstance(fields, dict) or not isinstance(fields.get("url"), str):
            self.wrong(f"{where}.{kind}", "has no url")
            return None
        known = ("url", *KINDS[kind][1:])
        for name in sorted((set(fields) - set(known)) | (set(part) - {"type", kind})):
            self.wrong(f"{where}.{name}", f"is not known here; {kind} has {', '.join(known)}")
        times = {name: fields.get(name) for name in ("start", "end", "fps")}
        for name, value in times.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e9
            if value is not None and not (is_number and (value > 0 or name != "fps")):
                what = "must be a number, 0 or more" + ", not 0" * (name == "fps") + ", and less than 1e9"
                self.wrong(f"{where}.{kind}.{name}", what)
                return None
        name = f"{where.replace('.content', '')} {kind.partition('_')[0]}"
        self.media[name] = fields["url"]
        return Image(name) if kind == "image_url" else Video(name, **times)
