"""A member that holds several conversations about the same media: {"records": [...]}."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vl3train.contracts.strict_json import json_text

RECORDS = "records"


def record_key(key: str, number: int) -> str:
    """What one of several records of a member is called.

    >>> record_key("000000007", 2)
    '000000007#2'
    """
    return f"{key}#{number}"


def member_of(key: str, number: int) -> str:
    """The member whose record ``number`` is called ``key``.

    >>> member_of("000000007#2", 2), member_of("000000007", 0)
    ('000000007', '000000007')
    """
    return key.removesuffix(record_key("", number))


def join_records(conversations: Sequence[bytes]) -> bytes:
    """The .json member of several conversations, each as ``Conversation.to_json``; of one it is that one."""
    if len(conversations) == 1:
        return conversations[0]
    return b'{"%s": [%s]}' % (RECORDS.encode(), b", ".join(conversations))


def split_records(data: bytes) -> list[bytes]:
    """The conversations of a .json member, damaged ones too; whatever else it holds comes as it is."""
    if RECORDS.encode() not in data:
        return [data]
    try:
        found = json.loads(data)
        if not isinstance(found, dict) or found.keys() != {RECORDS}:
            return [data]
        records = found[RECORDS]
        if not isinstance(records, list) or not any(
            isinstance(one, dict) and "turns" in one for one in records
        ):
            return [data]
        # In ASCII: half of a surrogate pair, which a damaged text may hold, has no UTF-8.
        return [json_text(one, sort_keys=True).encode() for one in records]
    except (ValueError, RecursionError):
        return [data]  # who reads the conversation says what is wrong
