"""The turns of a record, under the names that trainers and data sets give them.

Turns are read from lists of messages, from pairs of keys (`query` and `response`, `instruction` and `output`, ...) and
from a caption. What would change what is learned, if it were left out, is rejected with the way out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from vl3train.contracts.records import SampleError
from vl3train.contracts.redaction import shown_value
from vl3train.data.records.importers import IMPORTERS
from vl3train.data.records.media_files import MEDIA_KEY, SHOWN, find_media, is_nothing

DIALOGUE_KEYS = ("conversations", "messages", "conversation")
"""Keys under which a record may hold its turns."""

ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    **{"system": "system"},
}
ROLE_KEYS = ("from", "role")
TEXT_KEYS = ("value", "content")
SYSTEM_KEYS = ("system", "system_prompt")

PAIRS = (
    ("query", "response"),  # ms-swift
    ("instruction", "output"),  # Alpaca, LLaMA-Factory
    ("question", "answer"),
    ("prompt", "completion"),  # TRL
    ("prompt", "response"),
    ("instruction", "response"),
    ("question", "response"),
    ("q", "a"),
)
"""Keys of a question and its answer; the first pair of which both have a value counts."""

REJECTED_KEYS = (
    *("rejected", "rejected_response", "rejected_responses", "rejected_messages", "rejected_conversations"),
    *("rejected_images", "rejected_videos"),
)
PREFERENCE_KEYS = ("chosen", "kto_tag", *REJECTED_KEYS)
"""Of answers that are compared with each other."""
CHOICE_KEYS = ("choices", "options", "A")
"""Of the answers to choose from; a question without them is another question."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """The turns of a record as they stand there, and the keys of the record that they come from."""

    messages: list[Any]
    keys: frozenset[str]


def find_dialogue(record: Mapping[str, Any], *, chosen_only: bool = False) -> Dialogue:
    """The turns of a record, whichever form it has.

    Args:
        chosen_only: of preference data, take the chosen answer and leave the other out.

    Raises:
        SampleError: there are none; or what is learned would be another thing than what is written.
    """
    _reject_preferences(record, chosen_only)
    _reject_unread_prompts(record)
    found = _chosen(record) if chosen_only else None
    found = found or _listed(record) or _pair(record) or _caption(record)
    if found is None:
        raise SampleError(f"no conversation: {_ways_out(record)}")
    return _with_system(record, found)


def holds_dialogue(record: Mapping[str, Any]) -> bool:
    """Whether a record has turns, or the keys for them: it is no picture's metadata with a caption.

    >>> holds_dialogue({"question": "What?", "answer": "A cat."}), holds_dialogue({"caption": "A cat.", "url": "u"})
    (True, False)
    """
    pairs = any(
        not is_nothing(record.get(question)) and not is_nothing(record.get(reply))
        for question, reply in PAIRS
    )
    chosen = not is_nothing(record.get("prompt")) and not is_nothing(record.get("chosen"))
    return pairs or chosen or any(key in record for key in DIALOGUE_KEYS)


def text_of(value: Any) -> str | None:
    """Text as it stands, a number or a truth value as Python writes it; None of anything else.

    >>> text_of(3), text_of(True), text_of(0.5), text_of(None)
    ('3', 'True', '0.5', None)
    """
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int, Decimal)) or (isinstance(value, float) and value == value):
        return str(value)
    return None


def as_json(value: Any, key: str) -> Any:
    """The list or object that a text holds, as a cell of a table may; any other value as it is.

    Raises:
        SampleError: text that is no JSON.
    """
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        python = " and looks like Python's own writing" if re.match(r"\s*[\[{]\s*[\[{]?\s*'", value) else ""
        raise SampleError(
            f"the text under `{key}` is no JSON{python}: {shown_value(value, SHOWN)}; write it with json.dumps"
        ) from error


def _reject_preferences(record: Mapping[str, Any], chosen_only: bool) -> None:
    keys = [key for key in PREFERENCE_KEYS if not is_nothing(record.get(key))]
    if isinstance(record.get("label"), bool) and any(record.get(key) for key in ("messages", "completion")):
        keys.append("label")
    if keys and not chosen_only:
        raise SampleError(
            f"preference data ({', '.join(keys)}): which answer is better is not learned here; with --chosen-only "
            "the chosen answer is, and the other one is left out"
        )
    if any(record.get(key) is False for key in keys if key in ("kto_tag", "label")):
        raise SampleError("the answer is marked as a bad one; take the record out")


def _reject_unread_prompts(record: Mapping[str, Any]) -> None:
    """What is put into the prompt by the trainer that a record is written for, and would be missing here."""
    if not is_nothing(record.get("tools")) and record["tools"] != "[]":
        raise SampleError(
            "`tools` would be missing in the prompt; write them into the system turn and take the key out"
        )
    text = str([record.get(key) for key in (*DIALOGUE_KEYS, "query")])
    if record.get("objects") and re.search("<bbox>|<ref-object>", text):
        raise SampleError(
            "<bbox> and <ref-object> stand for `objects`; write the words and boxes into the text"
        )


def _listed(record: Mapping[str, Any]) -> Dialogue | None:
    """The first list of messages."""
    for key in DIALOGUE_KEYS:
        messages = as_rows(as_json(record.get(key), key))
        if isinstance(messages, Sequence) and not isinstance(messages, (str, bytes)) and len(messages):
            return Dialogue(list(messages), frozenset([key]))
    return None


def as_rows(value: Any) -> Any:
    """A list of objects that a table holds as an object of lists; any other value as it is.

    >>> as_rows({"role": ["user"], "content": ["Hi"]})
    [{'role': 'user', 'content': 'Hi'}]
    """
    if (
        not isinstance(value, Mapping)
        or not value
        or not all(isinstance(one, list) for one in value.values())
    ):
        return value
    if len({len(one) for one in value.values()}) > 1:
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]


def _pair(record: Mapping[str, Any], answer: tuple[str, Any] | None = None) -> Dialogue | None:
    """A question and its answer, with the input of an instruction and earlier turns. ``answer``: its key and value."""
    pairs = [(question, answer[0]) for question, _ in PAIRS] if answer else PAIRS
    values = {**record, answer[0]: answer[1]} if answer else record
    for question, reply in pairs:
        said = _as_turns(values.get(reply), "assistant")
        if question not in values or not said:
            continue
        asked = _as_turns(values[question], "user")
        if asked is None:
            continue
        keys = {question, reply}
        if question == "instruction" and (more := text_of(values.get("input"))):
            asked = _as_turns("\n".join(part for part in (values[question], more) if part), "user") or []
            keys.add("input")
        earlier = as_json(values.get("history"), "history") or []
        turns = [turn for pair in earlier for turn in _as_exchange(pair)]
        choices = [key for key in CHOICE_KEYS if not is_nothing(values.get(key))]
        if choices:
            raise SampleError(
                f"`{choices[0]}` would be left out of the question; write the choices into `{question}`, or leave "
                f"them out with --columns {question}=user {reply}=assistant"
            )
        return Dialogue([*turns, *asked, *said], frozenset([*keys, "history"]))
    return None


def _as_turns(value: Any, role: str) -> list[Any] | None:
    """One side's words as a turn; messages as they are; None of anything else."""
    if (
        isinstance(value, list)
        and value
        and all(isinstance(one, Mapping) and one.get("role") for one in value)
    ):
        return value
    text = text_of(value)
    return None if text is None else [{"role": role, "content": text}]


def _as_exchange(pair: Any) -> list[dict[str, Any]]:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise SampleError(f"history holds pairs of a question and an answer, not {shown_value(pair, SHOWN)}")
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]


def _caption(record: Mapping[str, Any]) -> Dialogue | None:
    """A picture or clip with a caption: the answer to it, without a question, as in LLaVA's pretraining."""
    caption = text_of(record.get("caption"))
    if not caption or not any(find_media(record, kind)[0] for kind in MEDIA_KEY):
        return None
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": caption}]
    return Dialogue(turns, frozenset(["caption"]))


def _chosen(record: Mapping[str, Any]) -> Dialogue | None:
    """The turns that lead to the chosen answer, and it; None where it stands in its ordinary place."""
    left_out = frozenset([*PREFERENCE_KEYS, "label"])
    value = (
        as_json(record["chosen"], "chosen") if str(record.get("chosen"))[:1] in "[{" else record.get("chosen")
    )
    if is_nothing(value):
        found = _listed(record) or _pair(record)
        return Dialogue(found.messages, found.keys | left_out) if found else None
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list):
        sides = {one.get("from", one.get("role")) for one in value if isinstance(one, Mapping)}
        if sides & {"user", "human"}:
            return Dialogue(value, left_out)  # the whole conversation
        before = _listed(record)
        prompt = _as_turns(record.get("prompt"), "user")
        turns = before.messages if before else prompt
        keys = before.keys if before else frozenset(["prompt"])
        return Dialogue([*turns, *value], keys | left_out) if turns else None
    found = _listed(record)
    if found:
        turns = [*found.messages, {"role": "assistant", "content": value}]
        return Dialogue(turns, found.keys | left_out)
    found = _pair(record, ("chosen", value))
    return Dialogue(found.messages, found.keys | left_out) if found else None


def _with_system(record: Mapping[str, Any], found: Dialogue) -> Dialogue:
    """The system's words of the record's own key as the first turn."""
    key = next((key for key in SYSTEM_KEYS if not is_nothing(record.get(key))), None)
    if key is None:
        return found
    own = next((one for one in found.messages if isinstance(one, Mapping) and _role(one) == "system"), None)
    if own is None:
        turn = {"role": "system", "content": record[key]}
        return Dialogue([turn, *found.messages], found.keys | {key})
    if next((own[name] for name in TEXT_KEYS if own.get(name)), None) != record[key]:
        raise SampleError(f"`{key}` and a system turn say different things; keep one of them")
    return Dialogue(found.messages, found.keys | {key})


def _role(message: Mapping[str, Any]) -> Any:
    return next((message[key] for key in ROLE_KEYS if message.get(key)), None)


def _ways_out(record: Mapping[str, Any]) -> str:
    """What a person can do about a record without turns: the importers that read it, or the columns to name."""
    readers = []
    for name, read in IMPORTERS.items():
        try:
            read(record)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
            continue
        readers.append(f"{name}:FILE")
    keys = [key for key in record if not is_nothing(record[key])]
    known = f"`conversations` or `messages` is missing or empty; keys: {list(record)}"
    if readers:
        return f"{known}; give it as {' or '.join(readers)} (docs/importers.md)"
    words = [key for key in keys if isinstance(record[key], (str, int, float))]
    example = " ".join(f"{key}={role}" for key, role in zip(words[-2:], ("user", "assistant"), strict=False))
    return f"{known}; name the columns of its turns, as in --columns {example or 'QUESTION=user ANSWER=assistant'}"
