"""Layers whose input waits on the host: the same gradients to the bit, and nothing left on the device meanwhile."""

from __future__ import annotations

import doctest
import weakref

import pytest
import torch

from tests.long import first_of
from vl3train.config.choices import Recompute
from vl3train.model.activations import offload
from vl3train.model.activations.offload import HostRows
from vl3train.model.packed_forward import PackedModel


def test_examples():
    assert doctest.testmod(offload).failed == 0


def gradients(model, batch, level, *, compiled=False):
    """Gradients of a step at one level."""
    model.zero_grad()
    packed = PackedModel(
        model, "reference", recompute_vision=level, recompute_language=level, compile_layers=compiled
    ).train()
    packed(batch).loss_sum.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def nothing_arrived(passes):
    """Whether the device has let go of all that it fetched in the backward pass."""
    return not any(one._arrived for host in passes for layer in host._layers for one in layer)


@pytest.mark.parametrize("compiled", first_of(False, True), ids=["eager", "compiled"])
def test_gradients_are_those_of_level_layer_to_the_bit_and_no_input_stays(
    tiny_model, batch_of, mixed, monkeypatch, compile_on_cpu, compiled
):
    model, batch = tiny_model(layers=3), batch_of(mixed)
    wanted = gradients(model, batch, Recompute.layer, compiled=compiled)
    inputs, passes = [], []
    keep = HostRows.keep_input

    def watched(self, rows):
        inputs.append(weakref.ref(rows))
        passes.append(self)
        return keep(self, rows)

    monkeypatch.setattr(HostRows, "keep_input", watched)
    packed = PackedModel(
        model,
        "reference",
        recompute_vision=Recompute.offload,
        recompute_language=Recompute.offload,
        compile_layers=compiled,
    ).train()
    model.zero_grad()
    loss = packed(batch).loss_sum
    assert [ref() for ref in inputs] == [None] * 6, "an input is still on the device after the forward pass"
    assert {tuple(map(len, tower._layers)) for tower in passes} == {(1, 1, 1)}, (
        "one copy a layer, in each tower"
    )
    loss.backward()
    assert nothing_arrived(passes)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, wanted[name]), name


def test_rows_that_are_fetched_ahead_are_let_go_with_the_pass(tiny_model, batch_of, mixed):
    """A second backward pass over the same graph finds them on the host again."""
    model, batch = tiny_model(), batch_of(mixed)
    once = gradients(model, batch, Recompute.offload)
    model.zero_grad()
    packed = PackedModel(
        model, "reference", recompute_vision=Recompute.offload, recompute_language=Recompute.offload
    ).train()
    loss = packed(batch).loss_sum
    loss.backward(retain_graph=True)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_on_a_gpu_gradients_are_near_those_of_level_layer_and_the_host_never_waits(
    tiny_model, batch_of, mixed, compiled
):
    model = tiny_model(head_dim=64, vision_head_dim=64, layers=4).to("cuda", torch.bfloat16)
    batch = batch_of(mixed).to("cuda")
    taken = {}
    for level in (Recompute.layer, Recompute.offload):
        packed = PackedModel(
            model, "torch_varlen", recompute_vision=level, recompute_language=level, compile_layers=compiled
        ).train()
        packed(batch).loss_sum.backward()  # kernels load and pages are locked here
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            taken[level] = torch.autograd.grad(packed(batch).loss_sum, list(model.parameters()))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(*taken.values(), strict=True):  # the kernel's sums have no fixed order
        assert (one - other).float().norm() <= 0.02 * one.float().norm() + 1e-6
