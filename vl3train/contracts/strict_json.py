"""JSON that every reader takes. JSON has no NaN and no infinity; Python's ``json`` writes words for them all the same.

In an object such a number is null, and its text stands beside it: ``"loss": null, "loss_text": "nan"``. In a list it is
null. This is the only place that writes JSON for files, requests and answers.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

TEXT = "_text"
LARGEST_FLOAT = sys.float_info.max
"""JSON has whole numbers of any length. A larger one than this is below infinity for Python, and yet no float."""


def json_text(
    value: Any, *, indent: int | None = None, sort_keys: bool = False, letters: bool = False
) -> str:
    """A value as JSON. ``letters``: those of all languages stand as they are, not as ``\\uXXXX``.

    >>> json_text({"loss": math.inf, "limits": [2.0, math.nan]})
    '{"loss": null, "loss_text": "inf", "limits": [2.0, null]}'
    """
    # allow_nan: what with_texts overlooked is a fault of ours.
    return json.dumps(
        with_texts(value), indent=indent, sort_keys=sort_keys, ensure_ascii=not letters, allow_nan=False
    )


def with_texts(value: Any) -> Any:
    """A tree that JSON can hold: a number that is not finite is null, with its text under another name beside it.

    >>> with_texts({"loss": math.nan, "of": {"captions": math.inf, "ocr": 2.0}})
    {'loss': None, 'loss_text': 'nan', 'of': {'captions': None, 'captions_text': 'inf', 'ocr': 2.0}}
    """
    if isinstance(value, dict):
        found: dict[Any, Any] = {}
        for key, one in value.items():
            found |= {key: None, f"{key}{TEXT}": str(one)} if _is_bad(one) else {key: with_texts(one)}
        return found
    if isinstance(value, list | tuple):
        return [with_texts(one) for one in value]
    return None if _is_bad(value) else value


def without_texts(value: Any) -> Any:
    """Undo ``with_texts`` in objects; a null of a list stays one.

    >>> without_texts({"loss": None, "loss_text": "inf", "most_loss": None, "note": None, "note_text": "a"})
    {'loss': inf, 'most_loss': None, 'note': None, 'note_text': 'a'}
    """
    if isinstance(value, dict):
        texts = {key for key, one in value.items() if one is None and value.get(f"{key}{TEXT}") in WORDS}
        return {
            key: float(value[f"{key}{TEXT}"]) if key in texts else without_texts(one)
            for key, one in value.items()
            if not (key.endswith(TEXT) and key.removesuffix(TEXT) in texts)
        }
    return [without_texts(one) for one in value] if isinstance(value, list) else value


WORDS = ("nan", "inf", "-inf")
"""What Python calls numbers that are not finite."""


def _is_bad(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
