"""Records of the same media: which of them may share what comes before their words.

The *head* of a conversation is what it has up to its last image or clip: turns, words, and how the media are shown.
Records with equal heads and equal media are a *family*.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict

from vl3train.contracts.strict_json import json_text
from vl3train.data.records.conversation import Conversation, Text


def family_number(conversation: Conversation, digest_of: Callable[[str], bytes]) -> int:
    """The same number, of 63 bits, for conversations that are of one family; 0 for one without media.

    Args:
        conversation: of one record.
        digest_of: what stands for the content of a part.
    """
    head: list[object] = []
    end = 0
    for turn in conversation.turns:
        head.append([turn.role, turn.supervised])
        for content in turn.content:
            if isinstance(content, Text):
                head.append(content.text)
                continue
            head.append({**asdict(content), "part": digest_of(content.part).hex()})
            end = len(head)
    if not end:
        return 0
    text = json_text(head[:end], sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1 or 1


def digest_of_bytes(parts: Mapping[str, bytes]) -> Callable[[str], bytes]:
    """What stands for the content of parts whose bytes are there."""
    return lambda part: hashlib.blake2b(parts[part], digest_size=16).digest()
