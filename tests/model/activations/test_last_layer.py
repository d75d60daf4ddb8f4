"""The last layer past attention: for supervised tokens alone. Loss and gradients are held by test_packed_forward.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.long import first_of
from vl3train.model.activations.last_layer import last_positions, rows_at
from vl3train.model.packed_forward import PackedModel


def rows_seen(model):
    """Rows that each product past attention gets, by layer."""
    seen = []
    for layer in model.model.language_model.layers:
        for module in (layer.self_attn.o_proj, layer.mlp):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return seen


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_it_works_for_the_tokens_that_the_loss_reads(tiny_model, batch_of, mixed, training):
    model, batch = tiny_model(), batch_of(mixed)
    seen, packed = rows_seen(model), PackedModel(model, "reference").train(training)
    tokens, supervised = len(batch.input_ids), len(batch.supervised_positions)
    assert 2 <= supervised < tokens / 2
    with torch.set_grad_enabled(training):
        narrow = packed(batch)
        assert seen == [tokens, tokens, supervised, supervised]
        seen.clear()
        whole = packed(batch, whole_last_layer=True)
        assert seen == [tokens] * 4
    torch.testing.assert_close(narrow.token_losses, whole.token_losses)
    assert torch.equal(narrow.correct, whole.correct)


@pytest.mark.parametrize(("supervised", "few"), [(0, False), (1, False), (2, True), (75, True), (76, False)])
def test_few_tokens_and_nearly_all_take_the_whole_layer(supervised, few):
    positions = torch.arange(supervised)
    found = last_positions(SimpleNamespace(supervised_positions=positions, input_ids=torch.zeros(100)))
    assert found is (positions if few else None)


@pytest.mark.parametrize("compiled", first_of(False, True))
def test_packs_with_hardly_any_supervised_token_run_as_before(
    tiny_model, batch_of, mixed, stock_gradients, compiled, compile_on_cpu
):
    model = tiny_model()
    packed = PackedModel(model, "reference", compile_layers=compiled).train()
    for answers in (0, 1):  # supervised tokens: none, one
        chosen = [mixed[4], mixed[5]][: 1 + answers]
        loss, stock = stock_gradients(model, chosen)
        model.zero_grad()
        output = packed(batch_of(chosen))
        output.loss_sum.backward()
        assert output.token_losses.shape == (answers,)
        assert output.loss_sum.item() == pytest.approx(loss, rel=1e-5)
        for name, parameter in model.named_parameters():
            expected = stock.get(name, torch.zeros_like(parameter))
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_chosen_rows_is_that_of_indexing():
    rows, positions = torch.randn(9, 4, dtype=torch.float64, requires_grad=True), torch.tensor([1, 2, 7])
    grad = torch.randn(3, 4, dtype=torch.float64)
    found = rows_at(positions, rows)
    (d_rows,) = torch.autograd.grad(found, rows, grad)
    (expected,) = torch.autograd.grad(rows[positions], rows, grad)
    assert torch.equal(found, rows[positions])
    assert torch.equal(d_rows, expected)
    assert rows_at(None, rows) is rows
    assert torch.equal(rows_at(positions, rows.detach()), rows[positions])
