"""Streaming records: labels equal, token by token, those of the original's two functions."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vl3train.contracts.tokens import IGNORE_INDEX, IM_END, IM_START, STREAM_END, STREAM_START, VIDEO_PAD
from vl3train.data.records.conversation import Conversation, Stream, Text, Turn
from vl3train.data.render.chat_tokens import ChatTokenizer, ItemTokens, render_conversation

KEPT = 3
"""Visual tokens of each frame."""


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return ChatTokenizer.from_folder(tokenizer_dir)


def streaming(*said: tuple[str, str, float]) -> Conversation:
    """Role, words and time of each message, as in a streaming record."""
    turns = []
    for role, words, time in said:
        turns += [Turn("stream", (Stream("0.mp4", time),)), Turn(role, (Text(words),))]
    return Conversation(tuple(turns))


NARRATED = streaming(
    ("user", "Say what happens.", 0.0),
    ("assistant", "A dog runs.", 2.0),
    ("assistant", "It stops.", 2.5),  # no frame between
    ("user", "And now?", 5.0),
    ("assistant", "It sleeps.", 6.0),
)
TIMES = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)


def messages_of(conversation: Conversation) -> list[tuple[str, str]]:
    """Role and rendered text of each message, as the original's _convert_stream lists them."""
    messages, shown = [], 0
    for turn in conversation.turns:
        for content in turn.content:
            if isinstance(content, Text):
                messages.append((turn.role, f"{IM_START}{turn.role}\n{content.text}{IM_END}\n"))
                continue
            while shown < len(TIMES) and TIMES[shown] <= content.until:
                words = f"stream\nTime {TIMES[shown]:.1f}s: {VIDEO_PAD * KEPT}\n"
                messages.append(("stream", f"{STREAM_START}{words}{STREAM_END}\n"))
                shown += 1
    return messages


def originals_labels(messages, hf_tokenizer, rule: str) -> tuple[list[int], list[int], list[int]]:
    """Ids, labels at the token itself before balancing, and types that are balanced.

    ``training``: _process_text_with_label of videollama3/model/processor.py. ``released``:
    _process_conversation_with_label of the released processing_videollama3.py.
    """
    pad, header = (
        hf_tokenizer.convert_tokens_to_ids(VIDEO_PAD),
        len(hf_tokenizer.encode(f"{IM_START}assistant\n")),
    )
    ids, labels, types = [], [], []
    for number, (role, text) in enumerate(messages):
        own = np.array(hf_tokenizer.encode(text))
        targets, kinds = np.full_like(own, IGNORE_INDEX), np.full_like(own, IGNORE_INDEX)
        if role == "assistant":
            targets[header:-1] = own[header:-1]
        elif role == "stream" and rule == "training":
            ends = np.flatnonzero(np.diff((own == pad).astype(int)) < 0)
            targets[ends + 1] = own[ends + 1]
            kinds = targets.copy()
            kinds[(kinds > 0) & (kinds != hf_tokenizer.convert_tokens_to_ids(IM_END))] = 0
            targets[-2] = own[-2]
        if rule == "released" and number and messages[number - 1][0] == "stream":
            targets[0] = kinds[0] = own[0]
        ids += own.tolist()
        labels += targets.tolist()
        types += kinds.tolist()
    return ids, labels, types


def rendered_labels(conversation: Conversation, tokenizer: ChatTokenizer, rule: str):
    """Ids, and labels at the token itself."""
    rendered = render_conversation(conversation, [ItemTokens((KEPT,) * len(TIMES), TIMES)], tokenizer, rule)
    return rendered.input_ids.tolist(), [IGNORE_INDEX, *rendered.labels[:-1].tolist()]


def test_as_the_originals_training_code(tokenizer, processor):
    ids, labels, types = originals_labels(messages_of(NARRATED), processor.tokenizer, "training")
    assert len({kind for kind in types if kind > -1}) == 1  # its balancing has nothing to compare
    assert rendered_labels(NARRATED, tokenizer, "training") == (ids, labels)
    learned = Counter(tokenizer.decode([label]) for label in labels if label != IGNORE_INDEX)
    assert (learned[STREAM_END], learned["\n"], learned[IM_END]) == (len(TIMES), len(TIMES), 3)


def test_the_training_code_is_the_default(tokenizer):
    items = [ItemTokens((KEPT,) * len(TIMES), TIMES)]
    default = render_conversation(NARRATED, items, tokenizer)
    assert (
        default.labels.tolist() == render_conversation(NARRATED, items, tokenizer, "training").labels.tolist()
    )


def test_as_the_originals_released_processor(tokenizer, processor):
    ids, labels, types = originals_labels(messages_of(NARRATED), processor.tokenizer, "released")
    ours, found = rendered_labels(NARRATED, tokenizer, "released")
    assert ours == ids
    kinds = Counter(kind for kind in types if kind > -1)
    start, speak = tokenizer.special_ids[STREAM_START], tokenizer.special_ids[IM_START]
    assert kinds == {start: 3, speak: 4}
    chosen = Counter(ids[at] for at, kind in enumerate(types) if kind > -1 and found[at] != IGNORE_INDEX)
    assert chosen == {start: 3, speak: 3}
    for at, (kind, label) in enumerate(zip(types, labels, strict=True)):
        assert found[at] == label or (kind == speak and found[at] == IGNORE_INDEX)


def test_equal_numbers_of_both_are_all_kept(tokenizer, processor):
    even = streaming(("user", "Go.", 1.0), ("assistant", "Yes.", 3.0))
    expected = originals_labels(messages_of(even), processor.tokenizer, "released")
    assert Counter(Counter(kind for kind in expected[2] if kind > -1).values()) == {2: 2}
    assert rendered_labels(even, tokenizer, "released") == expected[:2]


def test_one_kind_alone_is_kept_whole(tokenizer, processor):
    always = streaming(*(("assistant", f"{number}.", float(number)) for number in range(5)))
    expected = originals_labels(messages_of(always), processor.tokenizer, "released")
    assert rendered_labels(always, tokenizer, "released") == expected[:2]


def test_which_are_kept_is_a_function_of_the_sample(tokenizer):
    many = streaming(("user", "Go.", 0.0), ("assistant", "Now.", 6.0))
    first, second = (rendered_labels(many, tokenizer, "released") for _ in range(2))
    assert first == second
    kept = set()
    for number in range(40):
        other = streaming(("user", f"Go {number}.", 0.0), ("assistant", "Now.", 6.0))
        ids, labels = rendered_labels(other, tokenizer, "released")
        start = tokenizer.special_ids[STREAM_START]
        kept.add(tuple(np.flatnonzero([label == start for label in labels]) - ids.index(start, 1)))
    assert len(kept) > 3  # not the first ones always


def test_answers_only(tokenizer):
    _, labels = rendered_labels(NARRATED, tokenizer, "answers")
    text = tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
    assert text == f"A dog runs.{IM_END}It stops.{IM_END}It sleeps.{IM_END}"


def test_an_answer_out_of_the_loss_is_no_choice_to_speak(tokenizer):
    turns = tuple(
        Turn(turn.role, turn.content, turn.role != "assistant" or turn.content[0].text != "A dog runs.")
        for turn in NARRATED.turns
    )
    ids, labels = rendered_labels(Conversation(turns), tokenizer, "released")
    silent = ids.index(tokenizer.special_ids[IM_START], ids.index(tokenizer.special_ids[IM_START]) + 1)
    assert labels[silent] == IGNORE_INDEX
