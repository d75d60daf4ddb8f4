from __future__ import annotations

import pytest
import torch
from transformers import VideoLlama3ForConditionalGeneration

from tests.engine.packs import collate_samples, random_samples
from vl3train.engine.meter import Meter, make_meter


def test_figures_are_useful_work_over_wall_clock(tiny_model_dir):
    model = VideoLlama3ForConditionalGeneration.from_pretrained(tiny_model_dir)
    batches = [collate_samples(random_samples(model.config, 4, seed=seed)) for seed in (0, 1)]
    meter = make_meter(model, torch.device("cpu"))
    work = sum(meter.rates.of(batch) for batch in batches)
    assert work > 0
    assert meter.figures(batches, 2.0)["useful_tflops"] == pytest.approx(work / 2 / 1e12)
    assert meter.figures(batches, 2.0)["mfu_datasheet"] is None
    on_gpu = Meter(rates=meter.rates, peak_tflops=989.4, matmul_tflops=792.0)
    shares = on_gpu.figures(batches, 2.0)
    assert shares["mfu_matmul"] == pytest.approx(shares["useful_tflops"] / 792)
