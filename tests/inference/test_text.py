"""An answer's text grows in pieces that are never taken back."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vl3train.data.render.chat_tokens import ChatTokenizer
from vl3train.inference.text import GrowingText


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return ChatTokenizer.from_folder(tokenizer_dir)


def grown(tokenizer, ids, stops=()):
    """The text, the number of tokens that were made, and whether a stop text ended it."""
    growing, text = GrowingText(tokenizer, stops), ""
    for count in range(1, len(ids) + 1):
        text += growing.piece(ids[:count], ended=False)
        if growing.stopped:
            return text, count, True
    return text + growing.piece(ids, ended=True), len(ids), growing.stopped


@given(text=st.text(alphabet="ab \n\u00e4\u20ac\U0001f600.?", max_size=30))
@settings(max_examples=60, deadline=None)
def test_all_pieces_are_the_answer_without_outer_space(tokenizer, text):
    ids = tokenizer.encode(text)
    assert grown(tokenizer, ids) == (text.strip(), len(ids), False)
    assert grown(tokenizer, [*ids, tokenizer.im_end_id])[0] == text.strip()


@given(
    text=st.text(alphabet="ab \n\u20ac", max_size=20),
    stops=st.lists(st.text(alphabet="ab\n\u20ac", min_size=1, max_size=3), max_size=3),
)
@settings(max_examples=100, deadline=None)
@example(text="baa", stops=["a", "baa"])  # the second begins before the first, and is whole after it
def test_a_stop_text_ends_it_and_is_not_shown(tokenizer, text, stops):
    """The answer ends with the token that makes a stop text whole; of several then, the first in the text counts."""
    ids = tokenizer.encode(text.strip())
    expected, ends = text.strip(), False
    for count in range(1, len(ids) + 1):
        words = tokenizer.words(ids[:count])
        if places := [words.index(stop) for stop in stops if stop in words]:
            expected, ends = words[: min(places)].rstrip(), True
            break
    found, _, stopped = grown(tokenizer, ids, stops)
    assert (found, stopped) == (expected, ends)
