"""The canonical conversation: what a shard's ``.json`` member holds and what is rendered."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vl3train.contracts.records import SampleError
from vl3train.contracts.strict_json import LARGEST_FLOAT, json_text


@dataclass(frozen=True, slots=True)
class Text:
    """Words."""

    text: str
    type: str = field(default="text", init=False)


@dataclass(frozen=True, slots=True)
class Image:
    """A picture; ``part`` names its file among the sample's parts."""

    part: str
    type: str = field(default="image", init=False)


@dataclass(frozen=True, slots=True)
class Video:
    """A clip, or the piece of it between two times in seconds."""

    part: str
    start: float | None = None
    end: float | None = None
    fps: float | None = None  # frames a second that are taken; None: as many as of other clips
    type: str = field(default="video", init=False)


@dataclass(frozen=True, slots=True)
class Stream:
    """Those frames of a clip up to ``until`` (seconds of the file) that no earlier turn has shown."""

    part: str
    until: float
    start: float | None = None
    end: float | None = None
    fps: float | None = None
    type: str = field(default="stream", init=False)


Content = Text | Image | Video | Stream
CONTENT_TYPES: dict[str, Any] = {"text": Text, "image": Image, "video": Video, "stream": Stream}


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says. Roles: system, user, assistant, stream."""

    role: str
    content: tuple[Content, ...]
    supervised: bool = True
    """False: an answer that is shown and not learned."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The turns of one sample, in order."""

    turns: tuple[Turn, ...]

    def to_json(self, names: Sequence[str] | None = None) -> bytes:
        """The form that shards hold. ``names[i]`` renames the part of medium i."""
        fields = asdict(self)
        for turn in fields["turns"]:
            if turn["supervised"]:
                del turn["supervised"]  # as in shards of earlier builds
            for content in turn["content"]:
                if "fps" in content and content["fps"] is None:
                    del content["fps"]  # earlier builds do not know it
                if names is not None and "part" in content:
                    content["part"] = names[int(content["part"].partition(".")[0])]
        return json_text(fields, letters=True, sort_keys=True).encode()


def read_conversation(data: bytes | Mapping[str, Any]) -> Conversation:
    """A conversation from its canonical form, as bytes or as they were parsed.

    Raises:
        SampleError: it is not that form.
    """
    try:
        turns = []
        for turn in (json.loads(data) if isinstance(data, bytes) else data)["turns"]:
            content = tuple(
                CONTENT_TYPES[fields["type"]](**{key: fields[key] for key in fields if key != "type"})
                for fields in turn["content"]
            )
            if wrong := [reason for one in content if (reason := _wrong_value(one))]:
                raise TypeError(wrong[0])
            supervised = turn.get("supervised", True)
            if not isinstance(supervised, bool):
                raise TypeError(f"supervised={supervised!r} is neither true nor false")
            turns.append(Turn(str(turn["role"]), content, supervised))
    except (ValueError, KeyError, TypeError) as error:
        raise SampleError(f"not a conversation as `vl3train shards` writes it: {error!r}") from error
    return Conversation(tuple(turns))


def _wrong_value(content: Content) -> str | None:
    for key in content.__slots__:
        value = getattr(content, key)
        if key in ("text", "part") and not isinstance(value, str):
            return f"{key}={value!r} is no text"
        if key == "text" and (reason := half_character(value)):
            return reason
        if key in ("start", "end", "until") and not (
            (value is None and key != "until")
            or (
                isinstance(value, (int, float))
                and not isinstance(value, bool)
                and abs(value) <= LARGEST_FLOAT
            )
        ):
            return f"{key}={value!r} is no time in seconds"
        if (
            key == "fps"
            and value is not None
            and not (
                isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= LARGEST_FLOAT
            )
        ):
            return f"fps={value!r} is no number of frames a second"
    return None


BLANK_CATEGORIES = ("Cc", "Cf", "Zs", "Zl", "Zp")
"""Unicode's kinds of characters that show nothing: controls, joiners and byte-order marks, spaces."""


def is_learned(turn: Turn) -> bool:
    """Whether a turn is an answer with words that is to be learned.

    Of an answer without words only its end could be learned: to stop at once. So nothing of it is.

    >>> [is_learned(Turn("assistant", (Text(text),))) for text in ("Yes.", "", " \\n", "\\ufeff")]
    [True, False, False, False]
    """
    return turn.role == "assistant" and turn.supervised and has_words(turn)


def has_words(turn: Turn) -> bool:
    """Whether anything in a turn's text can be seen."""
    return any(
        unicodedata.category(character) not in BLANK_CATEGORIES
        for content in turn.content
        if isinstance(content, Text)
        for character in content.text
    )


def nothing_to_learn(turns: Sequence[Turn]) -> str | None:
    """Why nothing is learned of a conversation, and what to do; None where something is.

    One answer with words is enough. Answers without words beside it are shown and not learned.
    """
    if any(map(is_learned, turns)):
        return None
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not answers:
        return "no assistant turn: nothing to learn"
    if any(map(has_words, answers)):
        return "no supervised token: loss, weight or train is 0 in every answer; leave the record out"
    return "no supervised token: the assistant says nothing; write its answer, or leave the record out"


EMPTY_ANSWER = "an answer without words, which is shown and not learned"


def has_empty_answer(turns: Sequence[Turn]) -> bool:
    """Whether an answer among others has no words although it is one to learn."""
    return any(turn.role == "assistant" and turn.supervised and not has_words(turn) for turn in turns)


def half_character(text: str) -> str | None:
    """Why no UTF-8 can be written of a text: JSON may hold half a character, where one was cut inside an emoji.

    >>> half_character("a \\ud83d"), half_character("a 😀")
    ("'a \\\\ud83d' holds half a character, '\\\\ud83d'; take it out", None)
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"{text[:40]!a} holds half a character, {text[error.start]!a}; take it out"
    return None


def rename_parts(conversation: Conversation, names: Mapping[str, str]) -> Conversation:
    """The same conversation with some of its files under other names."""

    def renamed(content: Content) -> Content:
        if isinstance(content, Text) or content.part not in names:
            return content
        return replace(content, part=names[content.part])

    return Conversation(
        tuple(replace(turn, content=tuple(map(renamed, turn.content))) for turn in conversation.turns)
    )


def visual_items(conversation: Conversation) -> tuple[Image | Video | Stream, ...]:
    """The images and clips in order of appearance; of a streamed clip the turn that shows its last frames."""
    items: dict[str, Image | Video | Stream] = {}
    for turn in conversation.turns:
        for content in turn.content:
            if not isinstance(content, Text):
                items[content.part] = content  # a dict keeps the place of the first
    return tuple(items.values())
