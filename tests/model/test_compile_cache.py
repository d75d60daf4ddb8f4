"""Compiled layers are found on disk by a later process; what was changed since is not."""

from __future__ import annotations

import pytest
import torch

from vl3train.config.choices import Recompute
from vl3train.engine.compile_log import take_compiles
from vl3train.model.compiling import compiled
from vl3train.model.packed_forward import PackedModel


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    yield
    torch._dynamo.reset()


def as_a_new_process():
    """Nothing compiled is left in memory."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    take_compiles()


def test_layers_are_found_on_disk_and_give_the_same_gradients(tiny_model, batch_of, text_only, empty_cache):
    found = []
    for _ in range(2):
        as_a_new_process()
        model = tiny_model(layers=2)
        packed = PackedModel(
            model, "reference", recompute_language=Recompute.elementwise, compile_layers=True
        ).train()
        packed(batch_of(text_only)).loss_sum.backward()
        found.append((take_compiles(), {name: p.grad for name, p in model.named_parameters()}))
    (first, expected), (second, gradients) = found
    assert first.on_disk == 0
    assert second.on_disk == second.graphs == first.graphs > 0
    assert second.seconds < first.seconds
    for name, gradient in gradients.items():
        assert (gradient is None) == (expected[name] is None), name
        assert gradient is None or torch.equal(gradient, expected[name]), name


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        return rows * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class Wrong(Doubled):
    @staticmethod
    def backward(ctx, gradient):
        return gradient * 3


def test_another_backward_pass_is_not_taken_from_the_disk(empty_cache):
    for function, factor, on_disk in ((Doubled, 2.0, 0), (Doubled, 2.0, 1), (Wrong, 3.0, 0)):
        as_a_new_process()
        rows = torch.ones(5, 3, requires_grad=True)
        compiled(function.apply, enabled=True)(rows).sum().backward()
        assert torch.equal(rows.grad, torch.full((5, 3), factor))
        assert take_compiles().on_disk == on_disk
