"""The count of recomputed operations against torch's own counter, which sees every operation."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vl3train.config.choices import Recompute
from vl3train.model.activations.flops import flop_rates
from vl3train.model.activations.work import RecomputePlan, pack_size, recompute_rates
from vl3train.model.packed_forward import PackedModel
from vl3train.model.trainable import set_trainable

NOTHING, ELEMENTWISE, MLP, LAYER, OFFLOAD = Recompute


@pytest.fixture(autouse=True)
def _torch_linear(monkeypatch):
    """torch's own, which an engine under ZeRO-3 has replaced in this process if its tests ran before."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


def counted(model, batch, plan):
    """Operations of products with weights and of attention, as torch sees them in a step."""
    packed = PackedModel(model, "reference").train()
    # Attention as plain products, which torch counts; a causal square in full.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        packed(batch, plan=plan).loss_sum.backward()
    found = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in found.items() if "bmm" in str(op))
    return sum(found.values()) - attention, attention


@pytest.mark.parametrize(
    "levels",
    [
        RecomputePlan((NOTHING, LAYER), (LAYER, NOTHING)),
        RecomputePlan((OFFLOAD, OFFLOAD), (OFFLOAD, NOTHING)),
        RecomputePlan((NOTHING, NOTHING), (NOTHING, NOTHING)),
        RecomputePlan((NOTHING, NOTHING), (NOTHING, LAYER)),
    ],
)
@pytest.mark.parametrize("trained", [("vision_encoder", "projector", "language_model"), ("projector",)])
def test_useful_and_recomputed_work_are_all_that_torch_sees(tiny_model, batch_of, mixed, levels, trained):
    model, batch = tiny_model(), batch_of(mixed)
    set_trainable(model, trained)
    useful, recompute = flop_rates(model), recompute_rates(model, recomputes_logits=True)
    gemm_backend, attention = counted(model, batch, levels)
    # torch counts a causal square in full, flops.py and work.py half of it.
    squares = sum(length**2 for length in batch.segment_lengths)
    halves = recompute.language.layer_pair * sum(level in (LAYER, OFFLOAD) for level in levels.language)
    seen = useful.of(batch) + useful.token_pair * squares - useful.token_pair * squares // 2
    seen += recompute.of(batch, levels) + halves * (squares - squares // 2)
    assert gemm_backend + attention == seen


@pytest.mark.parametrize(
    "trained",
    [("vision_encoder", "projector", "language_model"), ("vision_encoder", "projector"), ("projector",)],
)
def test_the_work_of_both_passes_is_that_of_the_layers(tiny_model, batch_of, mixed, trained):
    model, size = tiny_model(), pack_size(batch_of(mixed))
    set_trainable(model, trained)
    rates, useful = recompute_rates(model, recomputes_logits=False), flop_rates(model)
    encoder, decoder = model.model.vision_model.encoder.layers, model.model.language_model.layers
    layers = [useful.patch_pair * size.patch_pairs + useful.token_pair * size.token_pairs]
    for tower, rows, backward in (
        (encoder, size.patches, "vision_encoder" in trained),
        (decoder, size.tokens, True),
    ):
        linears = [module for module in tower.modules() if isinstance(module, torch.nn.Linear)]
        layers += [
            2 * linear.weight.numel() * rows * (1 + backward + linear.weight.requires_grad)
            for linear in linears
        ]
    assert rates.forward(size) + rates.backward(size) == sum(layers)
    set_trainable(model, ())
    assert recompute_rates(model, recomputes_logits=False).forward(size) == rates.forward(size)
    assert recompute_rates(model, recomputes_logits=False).backward(size) == 0


@pytest.mark.parametrize("level", [ELEMENTWISE, MLP])
def test_products_that_are_recomputed_in_part(tiny_model, batch_of, mixed, level):
    """Without attention: as plain products, which no user runs, it is not kept."""
    model, batch = tiny_model(), batch_of(mixed)
    recompute = recompute_rates(model, recomputes_logits=True)
    base, _ = counted(model, batch, RecomputePlan((NOTHING,) * 2, (NOTHING,) * 2))
    gemm_backend, _ = counted(model, batch, RecomputePlan((level,) * 2, (level, NOTHING)))
    size = pack_size(batch)
    expected = 2 * recompute.vision.mlp_row * size.patches + recompute.language.mlp_row * size.tokens
    assert gemm_backend - base == (expected if level is MLP else 0)
    gemm_backend, _ = counted(model, batch, RecomputePlan((NOTHING,) * 2, (NOTHING, level)))
    assert gemm_backend - base == recompute.of(
        batch, RecomputePlan((NOTHING,) * 2, (NOTHING, level))
    ) - recompute.of(batch, RecomputePlan((NOTHING,) * 2, (NOTHING,) * 2))
