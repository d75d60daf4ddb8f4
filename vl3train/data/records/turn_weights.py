"""Which turns are learned: keys of a message by which other trainers take it out of the loss.

Read are ms-swift's ``loss`` and ``loss_scale``, OpenAI's, Together's and Mistral's ``weight``, and Axolotl's ``train``
and ``training``. Each is a bool, or 0 or 1. A turn counts whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vl3train.contracts.records import SampleError

LOSS_KEYS = ("loss", "loss_scale", "weight", "train", "training", "train_detail")
AXOLOTL_KEYS = ("train", "training")
WORDS = {"true": 1, "false": 0, "1": 1, "0": 0, "1.0": 1, "0.0": 0}
"""Values in tables of text."""


def is_supervised(message: Mapping[str, Any], role: str) -> bool:
    """Whether a message is learned, as far as its keys say; ``role`` is system, user or assistant.

    Only the assistant's turns are learned. Of other turns the keys change nothing, but for Axolotl's ``train: true``,
    which asks for what is not done here.

    >>> is_supervised({"content": "Yes.", "weight": 0}, "assistant"), is_supervised({}, "assistant")
    (False, True)

    Raises:
        SampleError: a fraction or another value; two keys that contradict each other; a part of a message that
            is to be learned; a user's or system's turn that is.
    """
    if message.get("train_detail"):
        raise SampleError(
            "train_detail picks parts of a turn, which is learned whole or not at all: split it in two"
        )
    whole = [key for key in LOSS_KEYS if key != "train_detail" and message.get(key) not in (None, "")]
    said = {key: _whole(key, message[key]) for key in whole}
    if len(set(said.values())) > 1:
        raise SampleError(f"{_written(said)} of one turn contradict each other; keep one of them")
    if role == "assistant":
        return all(said.values())
    if key := next((key for key in AXOLOTL_KEYS if said.get(key)), None):
        raise SampleError(
            f"{key}=1 of a {role} turn: only the assistant's turns are learned; take the key out"
        )
    return True


def _whole(key: str, value: Any) -> int:
    found = WORDS.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(found, (int, float)) or found not in (0, 1):
        raise SampleError(
            f"{key}={value!r}: a turn is learned whole (1, true) or not at all (0, false); "
            "for how often a source is seen, give its weight in the recipe"
        )
    return int(found)


def _written(said: Mapping[str, int]) -> str:
    return " and ".join(f"{key}={value}" for key, value in said.items())
