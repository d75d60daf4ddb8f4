"""Records as users have them, brought to one form: a conversation and the files it needs.

``forms.py`` finds the turns and ``media_files.py`` the media, whatever their keys are called; here the two are put
together. Nothing is guessed: what does not fit is rejected with its reason (SampleError).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vl3train.contracts.records import SampleError
from vl3train.contracts.redaction import shown_value
from vl3train.contracts.tokens import IMAGE_TAG, RESERVED_TOKENS, VIDEO_TAG
from vl3train.data.media.picture_lists import LIST_SUFFIX
from vl3train.data.records.clip_times import CLIP_KEYS, TIMES_KEYS, clip_rate, clip_window, seconds
from vl3train.data.records.conversation import (
    EMPTY_ANSWER,
    Content,
    Conversation,
    Image,
    Stream,
    Text,
    Turn,
    Video,
    half_character,
    has_empty_answer,
    nothing_to_learn,
)
from vl3train.data.records.forms import ROLE_KEYS, ROLES, TEXT_KEYS, find_dialogue, text_of
from vl3train.data.records.media_files import SHOWN, MediaFile, find_media, is_nothing, media_file
from vl3train.data.records.turn_weights import LOSS_KEYS, is_supervised

KINDS = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
TAGS = {"image": IMAGE_TAG, "video": VIDEO_TAG}
TAG = re.compile(f"({re.escape(IMAGE_TAG)}|{re.escape(VIDEO_TAG)})")

MESSAGE_KEYS = (*ROLE_KEYS, *TEXT_KEYS, *LOSS_KEYS, "time")
MEANINGLESS_KEYS = ("id",)
"""Keys that are not read and say nothing of what is learned."""


def read_record(
    record: Mapping[str, Any],
    *,
    where: str,
    chosen_only: bool = False,
    ignored: Counter[str] | None = None,
) -> tuple[Conversation, tuple[MediaFile, ...]]:
    """One record in any of the forms. ``where`` begins every reason.

    The tags ``<image>`` and ``<video>`` in user turns, and parts of a type without a file, stand for the record's
    files in order; where a kind has none at all, its files are shown before the first user turn. Text around tags is
    stripped, as the original code does (train.py:278). Turns of the assistant before the first other turn are
    removed, as it does too: they answer nothing.

    Args:
        chosen_only: of preference data, take the chosen answer.
        ignored: counts each key that is not read, ``turn.KEY`` of a message and ``part.KEY`` of a part of it; and
            records with an answer without words under ``EMPTY_ANSWER``.
    """
    try:
        reader = _Reader(record, chosen_only)
        turns = reader.read_stream() if record.get("stream") else reader.read_turns()
        if reason := nothing_to_learn(turns):
            raise SampleError(reason)
        for turn in turns:
            for content in turn.content:
                if isinstance(content, Text):
                    _reject_unwritable(content.text)
    except SampleError as error:
        raise SampleError(f"{where}: {error}") from error.__cause__
    if ignored is not None:
        ignored.update(reader.unread())
        ignored.update([EMPTY_ANSWER] * has_empty_answer(turns))
    return Conversation(tuple(turns)), tuple(reader.files)


@dataclass(frozen=True, slots=True)
class _Slot:
    """The place of a medium: of the record's next file, or of one that its part names."""

    kind: str
    source: Any = None
    said: Mapping[str, Any] | None = None  # the part


class _Reader:
    """One record being read; collects its files and the keys that are left over."""

    def __init__(self, record: Mapping[str, Any], chosen_only: bool) -> None:
        self.record = record
        self.files: list[MediaFile] = []
        self.left_over: set[str] = set()
        dialogue = find_dialogue(record, chosen_only=chosen_only)
        self.messages = dialogue.messages
        self.waiting, self.keys = {}, {*dialogue.keys, "stream", *MEANINGLESS_KEYS}
        for kind in TAGS:
            self.waiting[kind], keys = find_media(record, kind)
            self.keys |= keys

    def unread(self) -> set[str]:
        """Keys with a value that nothing was made of."""
        clip = CLIP_KEYS if any(file.kind == "video" for file in self.files) else ()
        return self.left_over | {
            str(key)
            for key, value in self.record.items()
            if key not in self.keys and key not in clip and not is_nothing(value)
        }

    def add(self, source: Any, kind: str, part: Mapping[str, Any]) -> Image | Video:
        """Take a file. What ``part`` says of a clip goes before what the record says of all its clips."""
        if kind == "image":
            file = media_file(source, kind)
        else:
            said = {**{key: self.record.get(key) for key in (*CLIP_KEYS, *TIMES_KEYS)}, **part}
            file = media_file(source, kind, times=self.times(source, said), fps=clip_rate(said))
        name = f"{len(self.files)}.{LIST_SUFFIX if file.pictures else file.suffix or kind}"
        self.files.append(file)
        if kind == "image":
            return Image(name)
        return Video(name, *clip_window(said), fps=None if file.pictures else file.fps)

    def times(self, source: Any, said: Mapping[str, Any]) -> tuple[float, ...] | None:
        """Seconds of the pictures of a clip. The same keys hold other things where a clip is a file."""
        key = next((key for key in TIMES_KEYS if not is_nothing(said.get(key))), None)
        if key is None or not isinstance(source, (list, tuple)):
            return None
        values = said[key] if isinstance(said[key], (list, tuple)) else [said[key]]
        self.keys.add(key)
        return tuple(seconds(key, value) for value in values)

    def read_turns(self) -> list[Turn]:
        messages = [self.message(message) for message in self.messages]
        first = next((number for number, (role, *_) in enumerate(messages) if role != "system"), 0)
        while len(messages) > first and messages[first][0] == "assistant":
            messages.pop(first)
        turns = [(role, self.pieces(role, content)) for role, content, _ in messages]
        missing = [_Slot(kind) for kind in TAGS for _ in range(self.num_missing(kind, turns))]
        read = []
        for (role, pieces), (*_, supervised) in zip(turns, messages, strict=True):
            if role == "user":
                pieces, missing = [*missing, *pieces], []
            read.append(Turn(role, tuple(self.content(role, piece) for piece in pieces), supervised))
        if missing:
            tags = "".join(TAGS[slot.kind] for slot in missing)
            raise SampleError(f"files for {tags}, but no user turn to put them in")
        return read

    def num_missing(self, kind: str, turns: Sequence[tuple[str, Sequence[Text | _Slot]]]) -> int:
        """How many of the record's files no tag and no part stands for: none, or all of them."""
        slots = [
            piece
            for _, pieces in turns
            for piece in pieces
            if isinstance(piece, _Slot) and piece.kind == kind
        ]
        own = [slot.source for slot in slots if slot.source is not None]
        tags, files = len(slots) - len(own), len(self.waiting[kind])
        if own and files:
            if own != self.waiting[kind] or tags:
                raise SampleError(
                    f"{len(own)} {kind}s in the messages and {files} more under the record's own key; name each once"
                )
            return 0
        if tags and tags != files:
            raise SampleError(f"{tags} {TAGS[kind]} tags for {files} {kind} files")
        return files - tags

    def message(self, message: Any) -> tuple[str, str | Sequence[Any], bool]:
        """Role, content, and whether it is learned where it is an answer."""
        role, content = _message(message)
        self.left_over |= {
            f"turn.{key}" for key in message if key not in MESSAGE_KEYS and not is_nothing(message[key])
        }
        return role, content, is_supervised(message, role)

    def pieces(self, role: str, content: str | Sequence[Any]) -> list[Text | _Slot]:
        """Words and places of media in the order in which a turn shows them."""
        if isinstance(content, str):
            return _split(content) if role == "user" else [Text(content)]
        parts = [self.part(part) for part in content]
        if (
            role == "user"
            and not any(isinstance(part, _Slot) for part in parts)
            and any(self.waiting.values())
        ):
            return [piece for part in parts if isinstance(part, Text) for piece in _split(part.text)]
        tags = [tag for part in parts if isinstance(part, Text) for tag in TAG.findall(part.text)]
        if role == "user" and tags and any(isinstance(part, _Slot) for part in parts):
            raise SampleError(
                f"{tags[0]} in the words beside a part that is a picture or clip; take the tag out"
            )
        return parts

    def part(self, part: Any) -> Text | _Slot:
        if not isinstance(part, Mapping):
            raise SampleError(f"content part {shown_value(part, SHOWN)} is no object with a type")
        name = str(part.get("type"))
        if name == "text" and (text := text_of(part.get("text"))) is not None:
            return Text(text)
        kind = KINDS.get(name)
        if kind is None or name == "text":
            raise SampleError(
                f"content part {shown_value(part, SHOWN)}: type must be text, {', '.join(KINDS)}, with its value"
            )
        key = _source_key(part)
        read = {"type", key, *(CLIP_KEYS if kind == "video" else ())}
        self.left_over |= {
            f"part.{other}" for other in part if other not in read and not is_nothing(part[other])
        }
        return _Slot(kind, None if key is None else part[key], part)

    def content(self, role: str, piece: Text | _Slot) -> Content:
        if isinstance(piece, Text):
            return piece
        if role == "assistant":
            raise SampleError(f"an assistant turn holds a part of type {piece.kind}; it may hold words only")
        source = self.waiting[piece.kind].pop(0) if piece.source is None else piece.source
        return self.add(source, piece.kind, piece.said or {})

    def read_stream(self) -> list[Turn]:
        sources = self.waiting["video"]
        if len(sources) != 1:
            raise SampleError(f"a streaming record has one video, this one {len(sources)}")
        clip = self.add(sources[0], "video", {})
        assert isinstance(clip, Video)
        turns = []
        for message in self.messages:
            role, content, supervised = self.message(message)
            until = None if is_nothing(message.get("time")) else seconds("time", message["time"])
            if until is None or not isinstance(content, str):
                raise SampleError("every message of a streaming record needs a text and a time in seconds")
            turns += [
                Turn("stream", (Stream(clip.part, until, clip.start, clip.end, fps=clip.fps),)),
                Turn(role, (Text(content),), supervised),
            ]
        return turns


def _message(message: Any) -> tuple[str, str | Sequence[Any]]:
    if not isinstance(message, Mapping):
        raise SampleError(f"turn {shown_value(message, SHOWN)} is no object")
    name = next((message[key] for key in ROLE_KEYS if message.get(key) is not None), None)
    content = next((message[key] for key in TEXT_KEYS if message.get(key) is not None), None)
    if not isinstance(name, str) or name not in ROLES:
        raise SampleError(f"unknown role {name!r}; known: {', '.join(ROLES)}")
    if not is_nothing(message.get("tool_calls")):
        raise SampleError("a turn with tool_calls, which would not be learned; write the calls into its text")
    text = text_of(content)
    if text is None and (not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray))):
        raise SampleError(f"{name} turn without text")
    return ROLES[name], list(content) if text is None else text  # type: ignore[arg-type]


def holds_media(message: Any) -> bool:
    """Whether parts of a message name their files themselves, as OpenAI's do."""
    content = message.get("content", message.get("value")) if isinstance(message, Mapping) else None
    parts = content if isinstance(content, (list, tuple)) else ()
    return any(
        isinstance(part, Mapping) and str(part.get("type")) in KINDS and _source_key(part) for part in parts
    )


def _source_key(part: Mapping[str, Any]) -> str | None:
    """The key of a part that names its file; None where the part stands for the record's next one."""
    name = str(part.get("type"))
    keys = (name, KINDS.get(name, name), "url", "path")
    return next((key for key in keys if not is_nothing(part.get(key))), None)


def _split(text: str) -> list[Text | _Slot]:
    """Words and tags of a user's text."""
    kinds = {tag: kind for kind, tag in TAGS.items()}
    pieces = (piece.strip() for piece in TAG.split(text))
    return [_Slot(kinds[piece]) if piece in kinds else Text(piece) for piece in pieces if piece]


def _reject_unwritable(text: str) -> None:
    if reason := half_character(text):
        raise SampleError(reason)
    for token in RESERVED_TOKENS:
        if token in text:
            raise SampleError(f"text holds {token}, which means structure; take it out or write it otherwise")
