from __future__ import annotations

import pytest
import torch
from transformers import VideoLlama3ForConditionalGeneration

from tests.engine.packs import collate_samples, random_samples
from vl3train.config.choices import Recompute
from vl3train.engine.monitor.meter import Meter, make_meter
from vl3train.model.activations.work import RecomputePlan

KEEP_ALL = RecomputePlan((Recompute.nothing,) * 2, (Recompute.nothing,) * 2)


def test_figures_are_useful_work_over_wall_clock(tiny_model_dir):
    model = VideoLlama3ForConditionalGeneration.from_pretrained(tiny_model_dir)
    batches = [collate_samples(random_samples(model.config, 4, seed=seed)) for seed in (0, 1)]
    meter = make_meter(model, torch.device("cpu"), recomputes_logits=True)
    work = sum(meter.rates.of(batch) for batch in batches)
    assert work > 0
    levels = [RecomputePlan((Recompute.layer, Recompute.nothing), (Recompute.mlp,) * 2), KEEP_ALL]
    figures = meter.figures(batches, levels, 2.0)
    assert figures["useful_tflops"] == pytest.approx(work / 2 / 1e12)
    assert figures["mfu_datasheet"] is None
    on_gpu = Meter(rates=meter.rates, recompute=meter.recompute, peak_tflops=989.4, matmul_tflops=792.0)
    shares = on_gpu.figures(batches, levels, 2.0)
    assert shares["mfu_matmul"] == pytest.approx(shares["useful_tflops"] / 792)


def test_the_share_that_is_computed_again_by_hand(tiny_model_dir):
    """Encoder of width 48 and 64, language model of width 64 and 96 with two of four heads for keys and values."""
    model = VideoLlama3ForConditionalGeneration.from_pretrained(tiny_model_dir)
    batch = collate_samples(random_samples(model.config, 4))
    meter = make_meter(model, torch.device("cpu"), recomputes_logits=True)
    patches, tokens = sum(batch.frame_lengths), sum(batch.segment_lengths)
    attention = 4 * 48 * sum(length**2 for length in batch.frame_lengths)
    encoder_layer = patches * 2 * (4 * 48 * 48 + 48 * 64) + attention
    gate_and_up = tokens * 2 * 2 * 64 * 96
    logits = len(batch.supervised_positions) * 2 * 64 * model.config.text_config.vocab_size
    levels = RecomputePlan((Recompute.layer, Recompute.elementwise), (Recompute.mlp, Recompute.nothing))
    expected = (encoder_layer + gate_and_up + logits) / meter.rates.of(batch)
    assert meter.figures([batch], [levels], 1.0)["recompute_fraction"] == expected
