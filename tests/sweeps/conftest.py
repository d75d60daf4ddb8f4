"""The small demo of the engine's tests."""

from __future__ import annotations

from tests.engine.conftest import demo_root, demo_words

__all__ = ["demo_root", "demo_words"]
