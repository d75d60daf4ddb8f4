"""Records as users have them, brought to one form: a conversation and the files it needs.

Three forms are read: VideoLLaMA3's and LLaVA's ``conversations``, OpenAI's ``messages``, and VideoLLaMA3's
streaming records. Nothing is guessed: what does not fit is rejected with its reason (SampleError).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from vl3train.contracts.records import SampleError
from vl3train.contracts.tokens import IMAGE_TAG, RESERVED_TOKENS, VIDEO_TAG
from vl3train.data.records.conversation import (
    Content,
    Conversation,
    Image,
    Stream,
    Text,
    Turn,
    Video,
    half_character,
)
from vl3train.data.shards.tar_headers import CAPTION_PART, CONVERSATION_PART

DIALOGUE_KEYS = ("conversations", "messages", "conversation")
"""Keys under which a record may hold its turns."""

ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    **{"system": "system"},
}
KINDS = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
TAGS = {"image": IMAGE_TAG, "video": VIDEO_TAG}
TAG = re.compile(f"({re.escape(IMAGE_TAG)}|{re.escape(VIDEO_TAG)})")


@dataclass(frozen=True, slots=True)
class MediaFile:
    """A file of a sample, or its bytes where a data set holds them itself."""

    path: str
    kind: str  # "image" or "video"
    data: bytes | None = None


def read_record(record: Mapping[str, Any], *, where: str) -> tuple[Conversation, tuple[MediaFile, ...]]:
    """One record in any of the three forms. ``where`` begins every reason.

    Of ``conversations`` and ``messages`` the tags ``<image>`` and ``<video>`` in user turns stand for the
    record's files in order; where a kind has no tag at all, its tags are put before the first user turn. Text
    around tags is stripped, as the original code does (train.py:278). Turns of the assistant before the first
    other turn are removed, as it does too: they answer nothing.
    """
    try:
        reader = _Reader(record)
        turns = reader.read_stream() if record.get("stream") else reader.read_turns()
        if not any(turn.role == "assistant" for turn in turns):
            raise SampleError("no assistant turn: nothing to learn")
        for turn in turns:
            for content in turn.content:
                if isinstance(content, Text):
                    _reject_unwritable(content.text)
        return Conversation(tuple(turns)), tuple(reader.files)
    except SampleError as error:
        raise SampleError(f"{where}: {error}") from error.__cause__


class _Reader:
    """One record being read; collects its files."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record
        self.files: list[MediaFile] = []
        self.start, self.end = _window(record)

    def add(
        self, source: Any, kind: str, start: float | None = None, end: float | None = None
    ) -> Image | Video:
        file = _media_file(source, kind)
        extension = re.sub(r"[^a-z0-9]", "", PurePath(file.path).suffix.lower()) or kind
        part = f"{len(self.files)}.{extension}"
        self.files.append(file)
        return Image(part) if kind == "image" else Video(part, start, end)

    def read_turns(self) -> list[Turn]:
        messages = [_message(message) for message in _messages(self.record)]
        while messages and messages[0][0] == "assistant":
            messages.pop(0)
        waiting = {kind: _as_list(self.record, kind) for kind in TAGS}
        counts = {kind: len(sources) for kind, sources in waiting.items()}
        said = "".join(content for role, content in messages if role == "user" and isinstance(content, str))
        missing = "".join(tag * counts[kind] for kind, tag in TAGS.items() if tag not in said)
        for kind, tag in TAGS.items():
            if tag in said and said.count(tag) != counts[kind]:
                raise SampleError(f"{said.count(tag)} {tag} tags for {counts[kind]} {kind} files")
        turns = []
        for role, content in messages:
            if not isinstance(content, str):
                turns.append(Turn(role, tuple(self.read_part(part) for part in content)))
            elif role == "user":
                pieces = [piece.strip() for piece in TAG.split(missing + content)]
                missing = ""
                turns.append(Turn(role, tuple(self.read_piece(piece, waiting) for piece in pieces if piece)))
            else:
                turns.append(Turn(role, (Text(content),)))
        if missing:
            raise SampleError(f"files for {missing}, but no user turn to put them in")
        return turns

    def read_piece(self, piece: str, waiting: dict[str, list[Any]]) -> Content:
        for kind, tag in TAGS.items():
            if piece == tag:
                return self.add(waiting[kind].pop(0), kind, self.start, self.end)
        return Text(piece)

    def read_part(self, part: Any) -> Content:
        if not isinstance(part, Mapping):
            raise SampleError(f"content part {part!r} is no object with a type")
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return Text(part["text"])
        kind = KINDS.get(str(part.get("type")))
        source = next((part[key] for key in (str(part.get("type")), "url", "path") if part.get(key)), None)
        if kind is None or source is None:
            raise SampleError(
                f"content part {dict(part)!r}: type must be text, {', '.join(KINDS)}, with its value"
            )
        return self.add(source, kind, *_window(part))

    def read_stream(self) -> list[Turn]:
        sources = _as_list(self.record, "video")
        if len(sources) != 1:
            raise SampleError(f"a streaming record has one video, this one {len(sources)}")
        part = self.add(sources[0], "video").part
        turns = []
        for message in _messages(self.record):
            until = _seconds(message, "time") if isinstance(message, Mapping) else None
            role, content = _message(message)
            if until is None or not isinstance(content, str):
                raise SampleError("every message of a streaming record needs a text and a time in seconds")
            turns += [
                Turn("stream", (Stream(part, until, self.start, self.end),)),
                Turn(role, (Text(content),)),
            ]
        return turns


def _messages(record: Mapping[str, Any]) -> Sequence[Any]:
    for key in DIALOGUE_KEYS:
        messages = record.get(key)
        if isinstance(messages, Sequence) and not isinstance(messages, str) and len(messages):
            return messages
    raise SampleError(
        f"no conversation: `conversations` or `messages` is missing or empty; keys: {list(record)}"
    )


def _message(message: Any) -> tuple[str, str | Sequence[Any]]:
    if not isinstance(message, Mapping):
        raise SampleError(f"turn {message!r} is no object")
    name = message.get("from", message.get("role"))
    content = message.get("value", message.get("content"))
    if not isinstance(name, str) or name not in ROLES:
        raise SampleError(f"unknown role {name!r}; known: {', '.join(ROLES)}")
    if not isinstance(content, (str, Sequence)) or isinstance(content, bytes):
        raise SampleError(f"{name} turn without text")
    return ROLES[name], content


def _as_list(record: Mapping[str, Any], kind: str) -> list[Any]:
    one, several = record.get(kind), record.get(f"{kind}s")
    if one not in (None, []) and several not in (None, []) and one != several:
        raise SampleError(f"it has {kind} and {kind}s, with other files in each; name all of them in {kind}s")
    value = several if one in (None, []) else one
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _media_file(source: Any, kind: str) -> MediaFile:
    data, path = None, source
    if isinstance(source, Mapping):
        data, path = source.get("bytes"), source.get("url") or source.get("path") or ""
    elif isinstance(source, bytes):
        data, path = source, ""
    if not isinstance(path, str) or not (path or data):
        raise SampleError(f"{kind} {source!r} is no file path")
    if reason := half_character(path):
        raise SampleError(reason)
    path = path.removeprefix("file://")
    if data is None and re.match(r"[a-z0-9]+:", path) and not re.match(r"[a-zA-Z]:[\\/]", path):
        raise SampleError(f"{kind} {path[:80]!r} is an address; download it and give the file's path")
    if (suffix := PurePath(path).suffix.lower().removeprefix(".")) in (CONVERSATION_PART, CAPTION_PART):
        raise SampleError(f"{kind} {path!r} is a .{suffix} file; name the {kind} itself")
    return MediaFile(path, kind, data)


def _window(record: Mapping[str, Any]) -> tuple[float | None, float | None]:
    start, end = _seconds(record, "start_time"), _seconds(record, "end_time")
    if start is not None and end is not None and end < start:
        raise SampleError(f"end_time={end} comes before start_time={start}")
    return start, end


def _seconds(record: Mapping[str, Any], key: str) -> float | None:
    value = record.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise SampleError(f"{key}={value!r} is no time in seconds")
    return float(value)


def _reject_unwritable(text: str) -> None:
    if reason := half_character(text):
        raise SampleError(reason)
    for token in RESERVED_TOKENS:
        if token in text:
            raise SampleError(f"text holds {token}, which means structure; take it out or write it otherwise")
