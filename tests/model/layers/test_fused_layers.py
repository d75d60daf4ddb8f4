"""Compiled layers take the fused passes, keep what they should, and give the gradients of layers without."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from tests.model.conftest import kept_rows
from vl3train.config.choices import Recompute
from vl3train.model.kernels import gemm_ops as quack_ops
from vl3train.model.kernels import ops
from vl3train.model.kernels.gemm_ops import gelu_linear_backward_reference
from vl3train.model.kernels.ops import gelu_backward_reference, norm_backward_reference
from vl3train.model.layers import attention_half
from vl3train.model.layers.tower import FUNCTIONS_ARE_REPEATED
from vl3train.model.packed_forward import PackedModel
from vl3train.model.trainable import part_of, set_trainable


class Adapted(nn.Linear):
    """No plain Linear, so to be called as a module, like one with an adapter."""


@pytest.mark.parametrize(
    ("trained", "recompute", "adapted", "norms", "gelus"),
    [
        # a layer has two norms; where the MLP of the encoder is called as a module, its norm goes with it
        (["vision_encoder", "projector"], Recompute.mlp, False, 8, 2),
        (["vision_encoder", "projector", "language_model"], Recompute.nothing, True, 6, 0),
        (["language_model"], Recompute.nothing, False, 4, 0),
        (["vision_encoder", "projector", "language_model"], Recompute.nothing, False, 8, 2),
    ],
    ids=["stage 1", "adapted", "frozen encoder", "nothing recomputed"],
)
@pytest.mark.parametrize("gemm_backend", ["torch", "quack"])
def test_compiled_layers_take_them_and_give_the_same_gradients(
    tiny_model,
    batch_of,
    mixed,
    stock_gradients,
    monkeypatch,
    trained,
    recompute,
    adapted,
    norms,
    gelus,
    gemm_backend,
):
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    )
    torch._dynamo.reset()
    model = tiny_model()
    _, stock = stock_gradients(model, mixed)
    set_trainable(model, trained)
    if adapted:
        for layer in model.model.vision_model.encoder.layers:
            layer.self_attn.out_proj.__class__ = Adapted
    packed = PackedModel(
        model,
        "reference",
        recompute_vision=recompute,
        recompute_language=recompute,
        compile_layers=True,
        gemm_backend=gemm_backend,
    ).train()
    if gemm_backend == "quack":
        # The heads of the tiny model, so that products turn them.
        monkeypatch.setattr(attention_half, "ROPE_HEAD_DIMS", (12, 16))
    ran = []
    gelu_ops = {"torch": (ops, gelu_backward_reference), "quack": (quack_ops, gelu_linear_backward_reference)}
    for place, op in ((ops, norm_backward_reference), gelu_ops[gemm_backend]):
        monkeypatch.setattr(place, op.__name__, lambda *args, op=op: ran.append(op) or op(*args))
    packed(batch_of(mixed)).loss_sum.backward()
    if recompute is Recompute.layer and not FUNCTIONS_ARE_REPEATED:
        norms = gelus = 0
    assert (ran.count(norm_backward_reference), len(ran) - ran.count(norm_backward_reference)) == (
        norms,
        gelus,
    )
    expected = {name: grad for name, grad in stock.items() if part_of(name) in trained}
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        worst = (found[name] - grad).abs().max() / grad.abs().max().clamp(min=1e-3)
        assert worst < 2e-5, f"{name}: differs by {worst:.1e} of its largest value"


@pytest.mark.parametrize("level", [Recompute.nothing, Recompute.elementwise], ids=str)
@pytest.mark.parametrize("frozen", [True, False])
def test_nothing_is_recomputed_that_was_kept_or_that_only_frozen_weights_would_take(
    tiny_model, batch_of, mixed, monkeypatch, frozen, level
):
    """What MLPs took once more, and the sums of biases: the gradients are held above."""
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    )
    torch._dynamo.reset()
    model = tiny_model()
    if frozen:
        set_trainable(model, ["vision_encoder", "projector"])
    asked = {"swiglu": [], "gelu": [], "rope": []}

    def watch(kind, place, name):
        plain = getattr(place, name)

        def act(*arguments):
            if kind != "rope" or arguments[3]:  # rotates back
                asked[kind].append(arguments[-1])
            return plain(*arguments)

        monkeypatch.setattr(place, name, act)

    watch("swiglu", quack_ops, "swiglu_linear_backward_reference")
    watch("gelu", quack_ops, "gelu_linear_backward_reference")
    watch("rope", ops, "rotate_reference")
    how = {
        "recompute_vision": level,
        "recompute_language": level,
        "compile_layers": True,
        "gemm_backend": "quack",
    }
    PackedModel(model, "reference", **how).train()(batch_of(mixed)).loss_sum.backward()
    # Back through the language model's two layers, then the encoder's.
    recompute = level is Recompute.elementwise
    assert asked == {
        "swiglu": [recompute and not frozen] * 2,
        "gelu": [recompute] * 2,
        "rope": [not frozen] * 2 + [True] * 2,
    }


def test_layers_that_take_none_of_it_are_compiled_once_for_all_lengths(
    tiny_model, batch_of, mixed, monkeypatch
):
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    )
    torch._dynamo.reset()
    model = tiny_model(layers=3)
    for layer in (*model.model.vision_model.encoder.layers, *model.model.language_model.layers):
        layer.self_attn.q_proj.__class__ = Adapted
    packed = PackedModel(model, "reference", compile_layers=True).train()
    graphs = []
    for conversations in (mixed, mixed[:2], mixed[1:]):
        model.zero_grad()
        packed(batch_of(conversations)).loss_sum.backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == graphs[2]
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    PackedModel(model, "reference").train()(batch_of(mixed[1:])).loss_sum.backward()
    for name, parameter in model.named_parameters():
        worst = (found[name] - parameter.grad).abs().max() / parameter.grad.abs().max().clamp(min=1e-3)
        assert worst < 2e-5, f"{name}: differs by {worst:.1e} of its largest value"


def test_what_is_recomputed_is_not_kept(tiny_model, batch_of, mixed, monkeypatch):
    """By products of quack; those of torch are in test_packed_forward.py."""
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    )
    torch._dynamo.reset()
    model, batch = tiny_model(), batch_of(mixed)
    of_both = 2 * model.config.text_config.intermediate_size
    widths = {of_both, of_both // 2, model.config.vision_config.intermediate_size}
    intermediate = {}
    for level in (Recompute.nothing, Recompute.elementwise, Recompute.mlp):
        packed = PackedModel(
            model,
            "reference",
            recompute_vision=level,
            recompute_language=level,
            compile_layers=True,
            gemm_backend="quack",
        ).train()
        with kept_rows(model, widths) as kept:
            packed(batch).loss_sum.backward()
        intermediate[level] = len(kept)
    # Of two layers in each tower: what GELU takes, gate and up in one, and what quack's products give beside.
    assert intermediate == {
        Recompute.nothing: 2 + 2 + 2 * 2,
        Recompute.elementwise: 2 + 2,
        Recompute.mlp: 0,
    }
