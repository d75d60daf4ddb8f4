"""A member of several records: each is read, or rejected, by itself."""

from __future__ import annotations

import json

import pytest

from tests.data.conftest import LIMITS, drawn_picture, picture_bytes
from tests.data.render.test_samples import SETTINGS
from vl3train.contracts.records import SampleError
from vl3train.data.render.chat_tokens import ChatTokenizer
from vl3train.data.render.samples import measure_sample
from vl3train.data.shards.several_records import join_records, split_records


def turns(question, answer="A picture."):
    shown = [{"type": "image", "part": "0.png"}, {"type": "text", "text": question}]
    said = [{"type": "text", "text": answer}]
    return [{"role": "user", "content": shown}, {"role": "assistant", "content": said}]


GOOD = {"turns": turns("What is it?")}
DAMAGED = {
    "no turns": {},
    "null": None,
    "a word": "turns",
    "turns of another kind": {"turns": "What?"},
    "a part that is not there": {
        "turns": [{"role": "user", "content": [{"type": "image", "part": "7.png"}]}]
    },
    "half of a letter": {"turns": turns("What is \ud83d?")},
    "no answer": {"turns": GOOD["turns"][:1]},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_record_costs_no_other(name, tokenizer_dir):
    """And is told as it would be alone."""
    tokenizer, parts = (
        ChatTokenizer.from_folder(tokenizer_dir),
        {"0.png": picture_bytes(drawn_picture(64, 64, 1))},
    )

    def outcome(conversation):
        try:
            return measure_sample(conversation, parts, SETTINGS, tokenizer, LIMITS)
        except SampleError as error:
            return str(error)

    member = join_records([json.dumps(one).encode() for one in (GOOD, DAMAGED[name], GOOD)])
    first, damaged, last = map(outcome, split_records(member))
    assert first == last == outcome(json.dumps(GOOD).encode())
    assert damaged == outcome(json.dumps(DAMAGED[name]).encode()) != first


@pytest.mark.parametrize(
    "data",
    [
        b'{"records": [{"turns": ' + b"[" * 99_999 + b"]" * 99_999 + b"}]}",
        b'{"records": [{"turns": [',
        b'{"records": []}',
        b'{"records": [1, 2]}',
        b'{"records": [{"turns": []}], "id": 1}',
    ],
)
def test_what_is_no_member_of_several_records_comes_as_it_is(data):
    assert split_records(data) == [data]
