from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vl3train.engine.monitor.compile_log import take_compiles
from vl3train.model.compiling import compiled
from vl3train.model.loss import grade_logits, loss_with_gradients, score_logits, supervised_loss


def build(num_supervised, dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(11, 6, dtype=dtype, requires_grad=True)
    head = nn.Linear(6, 17, bias=False).to(dtype)
    positions = torch.randperm(11)[:num_supervised]
    labels = torch.randint(0, 17, (num_supervised,))
    return hidden, head, positions, labels


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("num_supervised", [0, 1, 2, 7])
def test_equals_cross_entropy_and_calls_the_head_as_often_as_told(num_supervised, num_chunks):
    hidden, head, positions, labels = build(num_supervised)
    calls = []
    head.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    total, losses, correct = supervised_loss(hidden, head, score_logits, positions, labels, num_chunks)
    assert len(calls) == num_chunks
    ours = torch.autograd.grad(total, (hidden, head.weight))
    assert len(calls) == 2 * num_chunks, "every chunk is recomputed, or ranks fall out of step under ZeRO-3"

    logits = F.linear(hidden, head.weight)[positions]
    expected = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(total, expected.sum())
    assert torch.equal(correct, logits.argmax(-1) == labels)
    for mine, reference in zip(ours, torch.autograd.grad(expected.sum(), (hidden, head.weight)), strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("num_supervised", [0, 1, 2, 7])
@pytest.mark.parametrize("frozen", ["hidden", "head", "none"])
def test_gradients_made_with_the_logits_are_those_of_autograd(num_supervised, num_chunks, frozen):
    hidden, head, positions, labels = build(num_supervised)
    hidden.requires_grad_(frozen != "hidden")
    head.weight.requires_grad_(frozen != "head")
    inputs = [x for x in (hidden, head.weight) if x.requires_grad]
    scored = []

    def grade(logits, labels):
        scored.append(len(logits))
        return grade_logits(logits, labels)

    total, losses, correct = loss_with_gradients(hidden, head, grade, positions, labels, num_chunks)
    ours = torch.autograd.grad(total * 0.3, inputs)
    assert sum(scored) == num_supervised, "no logits are made twice"
    assert all(length <= -(-num_supervised // num_chunks) for length in scored)
    logits = F.linear(hidden, head.weight)[positions]
    expected = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(total, expected.sum())
    assert torch.equal(correct, logits.argmax(-1) == labels)
    for mine, reference in zip(ours, torch.autograd.grad(expected.sum() * 0.3, inputs), strict=True):
        torch.testing.assert_close(mine, reference)


def test_gradients_made_with_the_logits_are_given_once():
    """They are scaled where they lie: a second pass would scale them again."""
    hidden, head, positions, labels = build(3)
    total, *_ = loss_with_gradients(hidden, head, grade_logits, positions, labels, 1)
    torch.autograd.grad(total * 0.3, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.grad(total * 0.3, hidden)


def test_logits_of_one_chunk_exist_at_a_time():
    hidden, head, positions, labels = build(7)
    alive, most = [], 0

    class Head(nn.Module):
        def forward(self, rows):
            nonlocal most
            logits = head(rows)
            alive.append(rows.shape[0])
            most = max(most, rows.shape[0])
            return logits

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        supervised_loss(hidden, Head(), score_logits, positions, labels, 3)
    assert sum(alive) == 7
    assert most == 3
    assert not any(shape and shape[-1] == 17 for shape in saved), "logits are kept for the backward pass"


def test_bfloat16_logits_are_scored_in_float32():
    hidden, head, positions, labels = build(5, torch.bfloat16)
    total, losses, _ = supervised_loss(hidden, head, score_logits, positions, labels, 2)
    assert total.dtype == losses.dtype == torch.float32
    expected = F.cross_entropy(head(hidden[positions]).float(), labels, reduction="none")
    torch.testing.assert_close(losses, expected.detach())


def test_refuses_what_cannot_be():
    hidden, head, positions, labels = build(4)
    with pytest.raises(ValueError, match="at least 1"):
        supervised_loss(hidden, head, score_logits, positions, labels, 0)
    with pytest.raises(ValueError, match="positions"):
        supervised_loss(hidden, head, score_logits, positions, labels[:2], 1)
    with pytest.raises(ValueError, match="positions"):
        loss_with_gradients(hidden, head, grade_logits, positions, labels[:2], 1)
    with pytest.raises(ValueError, match="bias"):
        loss_with_gradients(hidden, nn.Linear(6, 17), grade_logits, positions, labels, 1)


@pytest.mark.parametrize(
    ("loss", "body"), [(loss_with_gradients, grade_logits), (supervised_loss, score_logits)]
)
def test_one_graph_serves_any_number_of_chunks(loss, body):
    head, hidden = nn.Linear(8, 32, bias=False), torch.randn(40, 8, requires_grad=True)
    positions, labels = torch.arange(3, 33), torch.randint(0, 32, (30,))
    score, graphs = compiled(body, enabled=True), []
    take_compiles()
    for num_chunks in (1, 2, 3, 1):
        loss(hidden, head, score, positions, labels, num_chunks)[0].backward()
        graphs.append(take_compiles().graphs)
    assert graphs in ([1, 0, 0, 0], [0, 0, 0, 0]), "a test before this one may have made it"
