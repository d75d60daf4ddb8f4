"""Keys that take a turn out of the loss are honoured, and refused where they ask for what is not done."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from vl3train.contracts.records import SampleError
from vl3train.data.prepare.rejections import describe_ignored
from vl3train.data.records.annotations import read_record
from vl3train.data.records.conversation import EMPTY_ANSWER, Conversation, read_conversation
from vl3train.data.records.shard_records import open_conversation


def messages(*answers: tuple[str, dict]) -> dict:
    """A question before each answer."""
    turns = []
    for text, keys in answers:
        turns += [{"role": "user", "content": "Q"}, {"role": "assistant", "content": text, **keys}]
    return {"messages": turns}


def supervised(record: dict) -> list[bool]:
    conversation = read_record(record, where="a")[0]
    return [turn.supervised for turn in conversation.turns if turn.role == "assistant"]


@pytest.mark.parametrize("key", ["loss", "weight", "train", "training", "loss_scale"])
@pytest.mark.parametrize("value", [False, 0, 0.0, "0", "false", "False"])
def test_a_turn_is_taken_out_and_the_others_stay(key: str, value: object):
    record = messages(("First.", {key: value}), ("Second.", {}), ("Third.", {key: None}))
    assert supervised(record) == [False, True, True]


@pytest.mark.parametrize("value", [True, 1, 1.0, "1", "true"])
def test_one_is_the_whole_turn(value: object):
    assert supervised(messages(("A.", {"weight": value}))) == [True]


def test_streaming_records_and_llava_turns_have_them_too():
    stream = {
        "stream": True,
        "video": ["a.mp4"],
        "conversation": [
            {"role": "assistant", "content": "A.", "time": 1.0, "loss": False},
            {"role": "assistant", "content": "B.", "time": 2.0},
        ],
    }
    assert supervised(stream) == [False, True]
    turns = [
        {"from": "human", "value": "Q"},
        {"from": "gpt", "value": "A.", "train": False},
        {"from": "human", "value": "Q"},
        {"from": "gpt", "value": "B."},
    ]
    assert supervised({"conversations": turns}) == [False, True]


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"weight": 0.5}, r"weight=0\.5: a turn is learned whole \(1, true\) or not at all \(0, false\)"),
        ({"loss_scale": 2.0}, r"loss_scale=2\.0: a turn is learned whole"),
        ({"weight": -1}, "weight=-1"),
        ({"loss": "maybe"}, "loss='maybe'"),
        ({"weight": [0, 1]}, "weight="),
        ({"weight": float("nan")}, "weight=nan"),
        ({"loss": True, "weight": 0}, "loss=1 and weight=0 of one turn contradict each other"),
        (
            {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]},
            "train_detail picks parts",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(keys: dict, reason: str):
    with pytest.raises(SampleError, match=reason):
        read_record(messages(("A.", keys)), where="a")


def test_only_the_assistants_turns_are_learned():
    record = messages(("A.", {}))
    for key in ("weight", "loss"):  # of other turns OpenAI and ms-swift do not read them
        record["messages"][0][key] = 1
    assert supervised(record) == [True]
    record["messages"][0]["train"] = True
    with pytest.raises(SampleError, match="train=1 of a user turn: only the assistant's turns are learned"):
        read_record(record, where="a")


def test_the_keys_are_not_told_as_unread():
    from collections import Counter

    ignored: Counter[str] = Counter()
    read_record(messages(("A.", {"weight": 1, "loss": True})), where="a", ignored=ignored)
    assert not ignored


def test_shards_hold_them():
    record = messages(("A.", {"loss": False}), ("B.", {}))
    conversation = read_record(record, where="a")[0]
    stored = conversation.to_json()
    assert read_conversation(stored) == conversation
    assert open_conversation(json.dumps(record).encode(), {}) == conversation
    plain = read_record(messages(("B.", {})), where="a")[0].to_json()
    assert b"supervised" not in plain  # the form of earlier builds
    wrong = json.loads(stored)
    wrong["turns"][1]["supervised"] = 0.5
    with pytest.raises(SampleError, match=r"supervised=0\.5 is neither true nor false"):
        read_conversation(wrong)


NOTHING = "no supervised token: the assistant says nothing; write its answer, or leave the record out"


@pytest.mark.parametrize("blank", ["", "  ", "\n", "\u00a0", "\ufeff", "\u200b"])
def test_a_record_without_any_words_of_the_assistant_is_refused(blank: str):
    with pytest.raises(SampleError, match=NOTHING):
        read_record(messages((blank, {}), (blank, {})), where="a")
    assert isinstance(read_record(messages((blank, {}), ("A.", {})), where="a")[0], Conversation)


def test_a_record_whose_answers_are_all_out_of_the_loss_is_refused():
    with pytest.raises(SampleError, match="loss, weight or train is 0 in every answer"):
        read_record(messages(("A.", {"loss": 0}), ("", {})), where="a")


def test_records_with_an_empty_answer_among_others_are_counted():
    counted: Counter[str] = Counter()
    for answers in (
        [("", {}), ("Yes.", {})],
        [("Yes.", {}), (" ", {}), ("", {})],
        [("", {"loss": False}), ("A", {})],
    ):
        read_record(messages(*answers), where="a", ignored=counted)
    assert counted == {EMPTY_ANSWER: 2}
    assert describe_ignored(counted) == ["2 with an answer without words, which is shown and not learned"]
