"""A model of the true architecture learns the benchmark's tasks from their files, in one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.lessons.parts import SIZES, make_parts
from benchmarks.lessons.quick import held_out, new_model, prepared, train

SIZE = replace(SIZES["debug"], vision_layers=2, text_layers=2, head_dim=32)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    make_parts(folder, SIZE, 1, "cpu")
    return folder


def test_held_out_loss_falls_in_a_few_steps(parts, tmp_path):
    """From 7 to about 1.5 nats a token in 20 steps. Most of it is language; the long test below is about pixels."""
    found = prepared(tmp_path, parts, {"train": 96, "same": 24}, ["captions"])
    model = new_model(parts)
    before = held_out(model, found["same"][::3])[0]
    train(model, found["train"][::3], steps=20, samples_a_step=8, rate=4e-3)
    assert held_out(model, found["same"][::3])[0] < before - 2


@pytest.mark.long
def test_captions_are_learned_from_pixels_and_not_from_blank_pictures(parts, tmp_path):
    """300 steps of 16 pictures with one shape."""
    counts = {"train": 1200, "same": 150}
    found = {
        change: prepared(tmp_path / change, parts, counts, ["captions"], change)
        for change in ("", "blank_images")
    }
    asked = found[""]["same"][::3]
    losses = {}
    for change, split in found.items():
        torch.manual_seed(0)
        model = new_model(parts)
        train(model, split["train"][::3], steps=300, samples_a_step=16, rate=3e-3)
        losses[change] = held_out(model, asked)[0]
    assert losses[""] < 0.6 * losses["blank_images"]
