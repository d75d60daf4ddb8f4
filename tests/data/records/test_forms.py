"""Turns are found under the names that trainers and data sets give them; what would go missing is rejected."""

from __future__ import annotations

import doctest
import json
from collections import Counter

import pytest

from vl3train.contracts.records import SampleError
from vl3train.data.records import clip_times, forms, media_files
from vl3train.data.records.annotations import read_record
from vl3train.data.records.conversation import Conversation, Image, Text, Turn, Video

CHAT = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
LLAVA = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]


def talk(*turns):
    """Turns, each a role and its contents."""
    return Conversation(tuple(Turn(role, tuple(contents)) for role, *contents in turns))


PLAIN_TURNS = (("user", Text("What?")), ("assistant", Text("A cat.")))
PLAIN = talk(*PLAIN_TURNS)
SEEN = talk(("user", Image("0.jpg"), Text("What?")), ("assistant", Text("A cat.")))
EARLIER = (("user", Text("Hi")), ("assistant", Text("Hello")))


@pytest.mark.parametrize("module", [forms, media_files, clip_times])
def test_examples_in_the_docstrings_hold(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"query": "<image>What?", "response": "A cat.", "images": ["a.jpg"]}, SEEN),
        (
            {"query": "What?", "response": "A cat.", "history": [["Hi", "Hello"]]},
            talk(*EARLIER, *PLAIN_TURNS),
        ),
        ({"instruction": "What?", "input": "", "output": "A cat.", "images": ["a.jpg"]}, SEEN),
        (
            {"instruction": "Sum up.", "input": "A long text.", "output": "Short."},
            talk(("user", Text("Sum up.\nA long text.")), ("assistant", Text("Short."))),
        ),
        (
            {"instruction": "What?", "output": "A cat.", "history": '[["Hi", "Hello"]]'},
            talk(*EARLIER, *PLAIN_TURNS),
        ),
        ({"question": "What?", "answer": "A cat.", "image": "a.jpg", "id": 3}, SEEN),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, PLAIN),
        ({"prompt": "What?", "completion": "A cat."}, PLAIN),
        ({"q": "How many?", "a": 3}, talk(("user", Text("How many?")), ("assistant", Text("3")))),
        ({"conversations": json.dumps(LLAVA), "image": "a.jpg"}, SEEN),
        ({"messages": {"role": ["user", "assistant"], "content": ["What?", "A cat."]}}, PLAIN),
        (
            {"image": "a.jpg", "caption": "A cat."},
            talk(("user", Image("0.jpg")), ("assistant", Text("A cat."))),
        ),
        ({"system": "Be brief.", "messages": CHAT}, talk(("system", Text("Be brief.")), *PLAIN_TURNS)),
        (
            {"system": "Be brief.", "query": "What?", "response": "A cat."},
            talk(("system", Text("Be brief.")), *PLAIN_TURNS),
        ),
        (
            {"system": "Be brief.", "messages": [{"role": "system", "content": "Be brief."}, *CHAT]},
            talk(("system", Text("Be brief.")), *PLAIN_TURNS),
        ),
    ],
)
def test_turns_in_the_form_of_others(record, expected):
    assert read_record(record, where="")[0] == expected


@pytest.mark.parametrize(
    ("value", "words"), [(3, "3"), (True, "True"), (False, "False"), (0.5, "0.5"), ("NA", "NA")]
)
def test_an_answer_that_is_a_number_or_a_truth_value_is_a_word(value, words):
    for record in (
        {"question": "Is it?", "answer": value},
        {"conversations": [LLAVA[0], {"from": "gpt", "value": value}]},
        {"messages": [CHAT[0], {"role": "assistant", "content": [{"type": "text", "text": value}]}]},
    ):
        assert read_record(record, where="")[0].turns[-1] == Turn("assistant", (Text(words),))


PREFERENCES = [
    {"query": "What?", "response": "A cat.", "rejected_response": "A dog."},
    {"messages": CHAT, "rejected_response": "A dog."},
    {"messages": CHAT, "rejected_messages": [CHAT[0], {"role": "assistant", "content": "A dog."}]},
    {"conversations": LLAVA[:1], "chosen": LLAVA[1], "rejected": {"from": "gpt", "value": "A dog."}},
    {"instruction": "What?", "chosen": "A cat.", "rejected": "A dog."},
    {"prompt": "What?", "chosen": "A cat.", "rejected": "A dog."},
    {"question": "What?", "chosen": "A cat.", "rejected": "A dog."},
    {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "A dog."}]},
    {"chosen": CHAT, "rejected": [CHAT[0], {"role": "assistant", "content": "A dog."}]},
    {"messages": CHAT, "kto_tag": True},
    {"prompt": "What?", "completion": "A cat.", "label": True},
    {"prompt": "What?", "chosen": json.dumps(CHAT), "rejected": json.dumps(CHAT)},
]


@pytest.mark.parametrize("record", PREFERENCES)
def test_of_preferences_the_chosen_answer_is_learned_only_when_asked(record):
    with pytest.raises(SampleError, match=r"preference data.*--chosen-only"):
        read_record(record, where="a:1")
    ignored: Counter[str] = Counter()
    assert read_record(record, where="", chosen_only=True, ignored=ignored)[0] == PLAIN
    assert set(ignored) <= {"prompt"}
    assert read_record({"messages": CHAT}, where="", chosen_only=True)[0] == PLAIN


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": CHAT, "kto_tag": False}, "preference data"),
        ({"conversations": str(LLAVA)}, "no JSON and looks like Python's own writing.*json.dumps"),
        ({"conversations": '[{"from": '}, "`conversations` is no JSON"),
        ({"question": "Which?", "choices": ["a", "b"], "answer": "a"}, "`choices` would be left out"),
        ({"messages": CHAT, "tools": "[{}]"}, "`tools` would be missing"),
        ({"messages": [CHAT[0], {**CHAT[1], "tool_calls": [{"id": 1}]}]}, "tool_calls"),
        ({"query": "<bbox>?", "response": "a", "objects": {"bbox": [[1, 2]]}}, "stand for `objects`"),
        ({"system": "A", "messages": [{"role": "system", "content": "B"}, *CHAT]}, "say different things"),
        ({"question": "What?", "answer": float("nan")}, "no conversation"),
        ({"query": "a", "response": "b", "history": ["x"]}, "history holds pairs"),
        ({"image": "a.jpg", "text": "A cat."}, "give it as caption:FILE"),
        ({"image": "a.jpg", "question": "a", "answers": ["b"]}, "question:FILE"),
        ({"images": ["a.jpg"], "texts": [{"user": "a", "assistant": "b"}]}, "cauldron:FILE"),
        ({"frage": "a", "antwort": "b"}, "--columns frage=user antwort=assistant"),
    ],
)
def test_what_would_be_learned_wrongly_is_rejected_with_the_way_out(record, reason):
    with pytest.raises(SampleError, match=reason):
        read_record(record, where="")


def test_an_answer_that_is_marked_as_a_bad_one_is_never_learned():
    for record in ({"messages": CHAT, "kto_tag": False}, {"prompt": "a", "completion": "b", "label": False}):
        with pytest.raises(SampleError, match="marked as a bad one"):
            read_record(record, where="", chosen_only=True)


def test_unread_keys_are_counted_once_a_record():
    turns = [{**CHAT[0], "name": "Ann"}, {**CHAT[1], "name": "Bob"}]
    part = {"type": "video", "video": "c.mp4", "max_pixels": 9, "fps": 2.0, "text": None}
    turns[0]["content"] = [part, {"type": "text", "text": "What?", "video": None}]
    record = {"messages": turns, "id": 4, "source": "x", "empty": None, "width": 4, "start": 1, "end": 2.5}
    ignored: Counter[str] = Counter()
    conversation, _ = read_record(record, where="", ignored=ignored)
    assert ignored == {"source": 1, "width": 1, "turn.name": 1, "part.max_pixels": 1}
    assert conversation.turns[0].content[0] == Video("0.mp4", 1.0, 2.5, 2.0)
    read_record({"messages": CHAT, "source": "x", "fps": 3}, where="", ignored=ignored)
    assert (ignored["source"], ignored["fps"]) == (2, 1)  # there is no clip that fps could be of
