"""The count of useful work against torch's own counter, on a model small enough to run."""

from __future__ import annotations

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vl3train.config.choices import AdapterKind
from vl3train.config.schema import AdapterConfig
from vl3train.model.activations.flops import flop_rates
from vl3train.model.adapters import add_adapters
from vl3train.model.packed_forward import PackedModel
from vl3train.model.trainable import set_trainable


def counted(model, batch):
    """Operations that torch sees in a step: of products with weights, and of attention."""
    # Attention as plain products, which torch counts; a causal square in full.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        PackedModel(model, "reference").train()(batch).loss_sum.backward()
    found = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in found.items() if "bmm" in str(op))
    return sum(found.values()) - attention, attention


def expected(model, batch):
    """The same by flop_rates; the loss computes its logits twice, which is no useful work but is seen."""
    rates = flop_rates(model)
    patch_pairs = rates.patch_pair * sum(n**2 for n in batch.frame_lengths)
    token_pairs = rates.token_pair * sum(n**2 for n in batch.segment_lengths)
    head = model.get_output_embeddings()
    logits = 2 * head.in_features * head.out_features * len(batch.supervised_positions)
    return rates.of(batch) - patch_pairs - token_pairs // 2 + logits, patch_pairs + token_pairs


@pytest.mark.parametrize(
    "trainable",
    [
        ("vision_encoder", "projector", "language_model"),
        ("vision_encoder", "projector"),
        ("projector", "language_model"),
        ("projector",),
        ("language_model",),
    ],
)
def test_every_product_is_counted_as_torch_counts_it(tiny_model, batch_of, mixed, trainable):
    model, batch = tiny_model(), batch_of(mixed)
    set_trainable(model, trainable)
    assert counted(model, batch) == expected(model, batch)


def test_adapters_are_counted_and_frozen_weights_take_no_gradient(tiny_model, batch_of, mixed):
    model, batch = tiny_model(), batch_of(mixed)
    set_trainable(model, ("projector", "language_model"))
    add_adapters(model, AdapterConfig(kind=AdapterKind.lora, rank=4, dropout=0.0))
    assert counted(model, batch) == expected(model, batch)
