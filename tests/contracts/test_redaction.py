"""Reasons and errors name the place of a file, and never what opens it."""

from __future__ import annotations

import doctest

import pytest

from vl3train.contracts import redaction
from vl3train.contracts.records import SampleError
from vl3train.contracts.redaction import shown_value, without_keys

KEY = "s3cr3t"


def test_doctests():
    assert doctest.testmod(redaction).failed == 0


@pytest.mark.parametrize(
    "address",
    [
        f"https://me:{KEY}@host/a.jpg",
        f"HTTPS://me:{KEY}@host:8443/a.jpg",
        f"https://{KEY}@host/a.jpg",
        f"https://host/a.jpg?X-Amz-Signature={KEY}",
        f"https://host/a.jpg?{KEY}",
        f"https://host/a.jpg#access_token={KEY}",
        f"https://me:{KEY}/{KEY}?{KEY}#{KEY}@host/a.jpg",
        f"https://me:{'long' * 40}{KEY}@host/a.jpg",
        f"s3://me:{KEY}@bucket/a.jpg",
        f"a.jpg?sig={KEY}",
        f"me:{KEY}@host/a.jpg",
    ],
)
def test_of_an_address_in_a_reason_only_the_place_is_left(address):
    for text in (
        shown_value(address, 80),
        shown_value({"url": address, "type": "image_url"}, 80),
        shown_value([{"image_url": {"url": address}}], 80),
        without_keys(f"no such file: {address}; paths start from --media-root"),
        str(SampleError(f"KeyError({address!r})")),
    ):
        assert KEY not in text
        assert "a.jpg" in text


def test_a_password_with_spaces_is_known_where_the_whole_value_is():
    assert shown_value(f"https://me:my {KEY}@host/a.jpg", 80) == "'https://host/a.jpg'"


@pytest.mark.parametrize(
    "name",
    ["Authorization", "api_key", "x-api-key", "SAS_TOKEN", "password", "aws_secret_access_key", "Cookie"],
)
def test_a_value_that_its_name_calls_secret_is_not_shown(name):
    assert KEY not in shown_value({name: KEY}, 80)
    assert KEY not in shown_value({"headers": [{name: [KEY]}]}, 80)


@pytest.mark.parametrize(
    "text",
    [
        "no such file: a/b.jpg; paths start from --media-root",
        "turn 3 of 'gpt' at 10:30:15 is empty; what is 3 < 4?",
        "image C:\\pictures\\a.jpg, or https://host:8443/@user/a.jpg",
        "mail me@host",
        "abfss://container@account/a.tar",
    ],
)
def test_what_holds_no_key_stays_as_it_is(text):
    assert without_keys(text) == text
    assert SampleError(text).args == (text,)


@pytest.mark.parametrize(
    ("piece", "letters"), [("a", 2**18), ("+a", 2**15), ("a:", 2**17), (")", 2**15), ("a://b:c/", 2**15)]
)
def test_a_text_that_is_made_for_patterns_to_choke_on_is_read(piece, letters):
    """Without limits the time grows with the square of the length: of a megabyte it is hours."""
    text = piece * (letters // len(piece))
    for hostile in (text, f"https://{text}", f"https://host/?{text}x"):
        assert isinstance(without_keys(hostile), str)
        assert len(shown_value(hostile, 80)) <= 80


def test_a_value_deeper_than_is_looked_at_is_shown_as_text():
    value = KEY[:0]
    for _ in range(900):
        value = [value]
    assert shown_value(value, 10) == "[[[[[[[[[["
