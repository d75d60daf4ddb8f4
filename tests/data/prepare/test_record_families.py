"""Records of a family come together once, in an order and in memory that have bounds."""

from __future__ import annotations

import itertools

import pytest

from vl3train.data.prepare.record_families import FamilySizes
from vl3train.data.records.conversation import Conversation, Image, Text, Turn
from vl3train.data.records.media_files import MediaFile


def record(picture: int, question: int) -> tuple[Conversation, tuple[MediaFile, ...]]:
    """A question about a picture of 1 000 bytes that the data set holds itself."""
    user = Turn("user", (Image("0.png"), Text(f"Question {question}?")))
    answer = Turn("assistant", (Text(f"{picture}"),))
    return Conversation((user, answer)), (MediaFile("", "image", bytes([picture]) * 1000),)


RECORDS = [record(picture, question) for question in range(4) for picture in range(10)]
"""Of a data set in which all pictures come once, then all once more, and so on."""


def members(**limit: int) -> list[tuple[int, int]]:
    """The picture of each member, and how many of its records there are."""
    sizes = FamilySizes()
    for one in RECORDS:
        sizes.count(*one)
    found = list(sizes.together(RECORDS, **limit))
    assert sorted(repr(one) for group, _ in found for one in group) == sorted(repr(one) for one, _ in RECORDS)
    for group, media in found:
        assert {turn.content[0].text for one in group for turn in one.turns[1:]} == {str(media[0].data[0])}
    return [(media[0].data[0], len(group)) for group, media in found]


def test_records_of_a_family_come_together_at_its_last():
    assert members() == [(picture, 4) for picture in range(10)]


@pytest.mark.parametrize("kept", [0, 3, 9])
def test_media_that_wait_have_a_bound(kept):
    """The family that waits longest is given up first; each record still comes once."""
    found = members(max_waiting_bytes=1000 * kept)
    assert len(found) > 10
    if not kept:
        assert found == [(picture, 1) for _, picture in itertools.product(range(4), range(10))]


def test_media_within_the_bound_come_once():
    assert members(max_waiting_bytes=10_000) == members()
