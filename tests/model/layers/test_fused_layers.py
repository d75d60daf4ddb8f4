"""Compiled layers take the fused passes, keep what they should, and give the gradients of layers without."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from tests.model.conftest import kept_rows
from vl3train.config.choices import Recompute
from vl3train.model.kernels import gemm_ops as quack_ops
from vl3train.model.kernels import ops
from vl3train.model.layers import attention_half
from vl3train.model.layers.tower import FUNCTIONS_ARE_REPEATED
from vl3train.model.packed_forward import PackedModel
from vl3train.model.trainable import part_of, set_trainable

LAYERS = 3
"""In each tower."""

ALL = ("vision_encoder", "projector", "language_model")
STAGE_1, LANGUAGE = ALL[:2], ALL[2:]


class Adapted(nn.Linear):
    """No plain Linear, so to be called as a module, like one with an adapter."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained at which level, and what a layer of both towers together then does."""

    gemm: str
    trained: tuple[str, ...]
    level: Recompute
    kept: int
    """Matrices as wide as an MLP's intermediate that are kept for the backward pass."""
    norms: int = 4
    """Fused backward passes of norms. Where the encoder's MLP is called as a module, its norm goes with it."""
    gelus: int = 1
    adapted: bool = False
    rope_in_product: bool = False
    """quack's products turn the rows, where heads have a size that they can turn."""

    def __str__(self) -> str:
        how = "-adapted" * self.adapted + "-rope in the product" * self.rope_in_product
        return f"{self.gemm}-{self.level.value}-{'+'.join(self.trained)}{how}"


CASES = [
    # torch keeps what GELU takes, and gate and up; quack gate and up in one, and what its products give beside.
    Case("torch", ALL, Recompute.nothing, kept=3),
    Case("torch", ALL, Recompute.elementwise, kept=3),
    Case("torch", ALL, Recompute.nothing, kept=3, norms=3, gelus=0, adapted=True),
    Case("quack", ALL, Recompute.nothing, kept=4, rope_in_product=True),
    Case("quack", STAGE_1, Recompute.mlp, kept=0, rope_in_product=True),
    Case("quack", ALL, Recompute.nothing, kept=3, norms=3, gelus=0, adapted=True, rope_in_product=True),
]
MORE_CASES = [
    Case("torch", ALL, Recompute.mlp, kept=0),
    Case("torch", ALL, Recompute.layer, kept=0),
    Case("torch", STAGE_1, Recompute.mlp, kept=0),
    Case("torch", LANGUAGE, Recompute.nothing, kept=2, norms=2, gelus=0),
    Case("quack", ALL, Recompute.elementwise, kept=2),
    Case("quack", ALL, Recompute.mlp, kept=0),
    Case("quack", STAGE_1, Recompute.elementwise, kept=2),
    Case("quack", LANGUAGE, Recompute.nothing, kept=2, norms=2, gelus=0, rope_in_product=True),
]


@pytest.fixture
def ran(monkeypatch):
    """The last argument of each call of each op, by the op's name: whether it recomputes, or sums for a bias."""
    found = {}

    def watch(place, name):
        plain, calls = getattr(place, name), found.setdefault(name, [])

        def run(*arguments):
            if name != "rotate_reference" or arguments[3]:  # rotates back
                calls.append(arguments[-1])
            return plain(*arguments)

        monkeypatch.setattr(place, name, run)

    for name in ("norm_backward_reference", "gelu_backward_reference", "rotate_reference"):
        watch(ops, name)
    for name in ("gelu_linear_backward_reference", "swiglu_linear_backward_reference"):
        watch(quack_ops, name)
    return found


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.long) for case in MORE_CASES)], ids=str
)
def test_compiled_layers_give_the_same_gradients_and_keep_what_they_do_not_recompute(
    tiny_model, batch_of, mixed, stock_gradients, compile_on_cpu, monkeypatch, ran, case
):
    """The compiler sees that a product in the backward pass is that of the forward pass, and would keep it: so it is an
    op of its own. Nothing is recomputed that was kept, or that only frozen weights would take.

    Level offload, whose graphs are those of level layer, is held to it in activations/test_offload.py.
    """
    torch._dynamo.utils.clear_compilation_metrics()
    model = tiny_model(layers=LAYERS)
    _, stock = stock_gradients(model, mixed)
    set_trainable(model, case.trained)
    if case.adapted:
        for layer in model.model.vision_model.encoder.layers:
            layer.self_attn.out_proj.__class__ = Adapted
    if case.rope_in_product:
        monkeypatch.setattr(attention_half, "ROPE_HEAD_DIMS", (8, 12))
    how = {"recompute_vision": case.level, "recompute_language": case.level, "gemm_backend": case.gemm}
    packed = PackedModel(model, "reference", compile_layers=True, **how).train()
    of_both = 2 * model.config.text_config.intermediate_size
    widths = {of_both, of_both // 2, model.config.vision_config.intermediate_size}
    with kept_rows(model, widths) as kept:
        packed(batch_of(mixed)).loss_sum.backward()
    assert len(kept) == LAYERS * case.kept
    recompute, of_language = case.level is not Recompute.nothing, "language_model" in case.trained
    repeated = FUNCTIONS_ARE_REPEATED or case.level is not Recompute.layer
    # Back through the language model's layers, then the encoder's.
    gelus = [recompute] * LAYERS * case.gelus
    sums_of_biases = [of_language] * LAYERS + [True] * LAYERS * ("vision_encoder" in case.trained)
    assert len(ran["norm_backward_reference"]) == LAYERS * case.norms * repeated
    assert ran["rotate_reference"] == sums_of_biases * repeated
    assert len(ran["gelu_backward_reference"]) == (
        LAYERS * case.gelus * repeated if case.gemm == "torch" else 0
    )
    if case.gemm == "quack":
        assert ran["gelu_linear_backward_reference"] == gelus
        assert ran["swiglu_linear_backward_reference"] == [recompute and of_language] * LAYERS
    expected = {name: grad for name, grad in stock.items() if part_of(name) in case.trained}
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_near(found, expected)
    metrics = torch._dynamo.utils.get_compilation_metrics()
    of_layers = [one for one in metrics if one.co_name == "_run" and one.graph_op_count]
    assert len(of_layers) <= 3, "one for each tower and one for the last layer, none for another"
    assert not any(one.restart_reasons for one in metrics), "each is traced once"


def assert_near(found, expected):
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        worst = (found[name] - grad).abs().max() / grad.abs().max().clamp(min=1e-3)
        assert worst < 2e-5, f"{name}: differs by {worst:.1e} of its largest value"


@pytest.mark.long
def test_layers_that_take_none_of_it_are_compiled_once_for_all_lengths(
    tiny_model, batch_of, mixed, compile_on_cpu
):
    torch._dynamo.reset()  # the file's graphs come near the limit of compiling.py
    model = tiny_model(layers=LAYERS)
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
    assert_near(found, {name: parameter.grad for name, parameter in model.named_parameters()})
