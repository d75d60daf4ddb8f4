"""A config as plain values."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from typing import Any


def as_plain(cfg: Any) -> dict[str, Any]:
    """A config as nested dicts of plain values, enums as their values: the form that is logged, saved and compared."""

    def plain(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return value

    result = plain(asdict(cfg))
    assert isinstance(result, dict)
    return result
