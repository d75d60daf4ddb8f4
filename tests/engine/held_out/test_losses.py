"""Held-out figures: exact match per sample, chance is the most frequent answer."""

from __future__ import annotations

import pytest

from vl3train.engine.held_out.losses import summarize


def test_figures_are_of_samples_not_of_tokens():
    rows = [
        # source, all right, loss sum, supervised tokens, answer
        (0, True, 1.0, 2, (5, 9)),
        (0, False, 3.0, 6, (6, 9)),
        (0, True, 2.0, 2, (5, 9)),
        (1, False, 4.0, 1, (7,)),
    ]
    figures = summarize(rows, ["count", "colour", "empty"])
    assert figures["count"]["accuracy"] == pytest.approx(2 / 3)
    assert figures["count"]["chance"] == pytest.approx(2 / 3)
    assert figures["count"]["loss"] == pytest.approx(6.0 / 10)
    assert figures["colour"] == {
        "samples": 1,
        "loss": 4.0,
        "accuracy": 0.0,
        "chance": 1.0,
        "supervised_tokens": 1,
    }
    assert "empty" not in figures
