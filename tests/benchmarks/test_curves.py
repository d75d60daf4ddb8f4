"""Loss curves of the benchmark: the same training by packs and by transformers, drawn side by side."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.curves.tables import Curve, curve_line, differences, kept_curves
from benchmarks.curves.task import make_task
from benchmarks.loss_curves import draw_all, visible_gpus
from vl3train.config.choices import Dtype


@pytest.mark.long
def test_packs_and_transformers_draw_the_same_curve_in_float32(tmp_path):
    task = make_task(tmp_path, scale=0.02, part_steps=2)
    stock, packed = (Curve(packed=packed, dtype=Dtype.float32) for packed in (False, True))
    turned = replace(stock, turned=True)
    kept = tmp_path / "curves.jsonl"
    with kept.open("w") as file:
        for curve, losses in draw_all([stock, packed, turned], task, num_steps=5, processes=2, cuda=False):
            print(json.dumps(curve_line(curve, losses)), file=file)
    found = kept_curves(kept)
    assert found.keys() == {stock, packed, turned}
    assert {len(losses) for losses in found.values()} == {5}
    assert 0 < differences(found, packed, stock)["first_50_steps"] < 1e-4
    assert found[packed][0] != found[packed][-1]
    assert 0 < differences(found, turned, stock)["first_50_steps"] < 1e-4
    assert task.steps(5, 8, seed=1)[0] != task.steps(5, 8, seed=0)[0]


def test_curves_are_drawn_on_the_gpus_that_are_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert visible_gpus() == ["3", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert visible_gpus() == ["0", "1"]
