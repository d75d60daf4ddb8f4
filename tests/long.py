"""Which cases of a test run every time, and which with --long only."""

from __future__ import annotations

from typing import Any

import pytest

LONG = pytest.mark.long


def first_of(*cases: Any) -> list[Any]:
    """Cases for ``pytest.mark.parametrize``: the first runs every time, the others with --long."""
    return [
        cases[0],
        *(pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=LONG) for one in cases[1:]),
    ]
