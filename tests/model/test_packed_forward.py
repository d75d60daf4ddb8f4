from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vl3train.config.choices import Recompute
from vl3train.contracts.tokens import IGNORE_INDEX
from vl3train.model.activations.work import RecomputePlan
from vl3train.model.layers.tower import LayerCallbacks
from vl3train.model.packed_forward import PackedModel, head_dims, merge_patches
from vl3train.model.trainable import part_of, set_trainable


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, stock):
    assert ours.keys() == stock.keys()
    for name, expected in stock.items():
        scale = max(float(expected.abs().max()), 1e-3)
        worst = float((ours[name] - expected).abs().max()) / scale
        assert worst < 2e-5, f"{name}: differs by {worst:.1e} of its largest value"


@pytest.mark.parametrize("recompute", list(Recompute))
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_packed_equals_alone(tiny_model, batch_of, mixed, stock_gradients, tied, recompute):
    model = tiny_model(tied=tied)
    stock_loss, stock = stock_gradients(model, mixed)
    assert len(stock) == len(list(model.parameters()))
    towers = model.model.language_model.layers, model.model.vision_model.encoder.layers
    calls = count_calls(*(layers[0].mlp for layers in towers))
    packed = PackedModel(model, "reference", recompute_vision=recompute, recompute_language=recompute).train()
    output = packed(batch_of(mixed))
    output.loss_sum.backward()
    assert calls == ([1, 1] if recompute is Recompute.nothing else [2, 2])
    assert output.loss_sum.item() == pytest.approx(stock_loss, rel=1e-5)
    assert_same_gradients(gradients(model), stock)
    assert output.loss_sum.dtype == output.token_losses.dtype == torch.float32
    assert not output.token_losses.requires_grad
    torch.testing.assert_close(output.token_losses.sum(), output.loss_sum.detach())


def test_a_plan_is_for_one_forward_pass(tiny_model, batch_of, mixed):
    """The next pass without one follows the plan of the constructor's levels."""
    model, batch = tiny_model(), batch_of(mixed)
    packed = PackedModel(model, "reference").train()
    encoder, decoder = model.model.vision_model.encoder.layers, model.model.language_model.layers
    calls = count_calls(*(layer.mlp for layer in (*encoder, *decoder)))
    nothing, layer = Recompute.nothing, Recompute.layer
    packed(batch, plan=RecomputePlan((layer, nothing), (nothing, layer))).loss_sum.backward()
    assert calls == [2, 1, 1, 2]
    packed(batch).loss_sum.backward()
    assert calls == [3, 2, 2, 3]


def test_callbacks_are_called_around_each_layer_of_their_forward_pass_alone(tiny_model, batch_of, mixed):
    model, called = tiny_model(layers=3), []
    packed = PackedModel(model, "reference").train()
    callbacks = LayerCallbacks(
        before_layer=lambda: called.append("before"), after_layer_backward=lambda: called.append("after")
    )
    loss = packed(batch_of(mixed), callbacks=callbacks).loss_sum
    assert called == ["before"] * 6
    packed(batch_of(mixed)).loss_sum.backward()
    assert called == ["before"] * 6
    loss.backward()
    assert called == ["before"] * 6 + ["after"] * 6


def count_calls(*modules):
    counts = [0] * len(modules)

    def count(index):
        def hook(*_):
            counts[index] += 1

        return hook

    for index, module in enumerate(modules):
        module.register_forward_pre_hook(count(index))
    return counts


def test_token_losses_and_hits_are_those_of_the_stock_logits(tiny_model, batch_of, mixed):
    model = tiny_model()
    losses, hits = [], []
    with torch.no_grad():
        for conversation in mixed:
            logits = model(**conversation.stock_inputs()).logits[0]
            chosen = conversation.labels != IGNORE_INDEX
            losses.append(
                torch.nn.functional.cross_entropy(
                    logits[chosen], conversation.labels[chosen], reduction="none"
                )
            )
            hits.append(logits[chosen].argmax(-1) == conversation.labels[chosen])
        output = PackedModel(model, "reference").eval()(batch_of(mixed, num_loss_chunks=5))
    torch.testing.assert_close(output.token_losses, torch.cat(losses), rtol=1e-5, atol=1e-5)
    assert torch.equal(output.correct, torch.cat(hits))


def test_the_order_of_samples_changes_nothing(tiny_model, batch_of, mixed):
    packed = PackedModel(tiny_model(), "reference").eval()
    with torch.no_grad():
        one, other = packed(batch_of(mixed)), packed(batch_of(mixed[::-1]))
    torch.testing.assert_close(one.token_losses.sort()[0], other.token_losses.sort()[0])


@pytest.mark.parametrize("trained", [["projector"], ["vision_encoder", "projector"], ["language_model"]])
def test_frozen_parts_get_no_gradient_and_the_others_the_same(
    tiny_model, batch_of, mixed, stock_gradients, trained
):
    model = tiny_model()
    _, stock = stock_gradients(model, mixed)
    set_trainable(model, trained)
    PackedModel(model, "reference")(batch_of(mixed)).loss_sum.backward()
    assert_same_gradients(gradients(model), {n: g for n, g in stock.items() if part_of(n) in trained})


@pytest.mark.parametrize("recompute", [Recompute.nothing, Recompute.layer])
def test_text_only_runs_the_encoder_and_gives_it_zero_gradients(
    tiny_model, batch_of, text_only, stock_gradients, recompute
):
    model = tiny_model()
    _, stock = stock_gradients(model, text_only)
    packed = PackedModel(model, "reference", recompute_vision=recompute, recompute_language=recompute).train()
    packed(batch_of(text_only)).loss_sum.backward()
    ours = gradients(model)
    assert ours.keys() == {name for name, _ in model.named_parameters()}
    assert_same_gradients({n: g for n, g in ours.items() if part_of(n) == "language_model"}, stock)
    assert not any(g.any() for n, g in ours.items() if part_of(n) != "language_model")


def test_text_only_in_stage_one_still_runs_the_frozen_layers_backward(tiny_model, batch_of, text_only):
    """The ranks with images do, and ZeRO-3 gathers each layer there: a rank that did not would hang them."""
    model = tiny_model()
    set_trainable(model, ["vision_encoder", "projector"])
    ran = []
    model.model.language_model.layers[0].mlp.register_full_backward_hook(lambda *_: ran.append(1))
    PackedModel(model, "reference")(batch_of(text_only)).loss_sum.backward()
    assert ran
    assert all(p.grad is not None for p in model.model.projector.parameters())


def test_a_pack_without_supervised_tokens_has_loss_zero_and_all_gradients(tiny_model, batch_of, mixed):
    for conversation in mixed:
        conversation.labels.fill_(IGNORE_INDEX)
    model = tiny_model()
    output = PackedModel(model, "reference")(batch_of(mixed, num_loss_chunks=3))
    output.loss_sum.backward()
    assert output.loss_sum.item() == 0
    assert output.token_losses.shape == output.correct.shape == (0,)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


class NoSync(TorchDispatchMode):
    """Fails on what makes the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        waiting = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")
        assert not any(op in name for op in waiting), name
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(tiny_model, batch_of, mixed, text_only):
    recompute = Recompute.elementwise
    packed = PackedModel(
        tiny_model(), "reference", recompute_vision=recompute, recompute_language=recompute
    ).train()
    for conversations in (mixed, text_only):
        batch = batch_of(conversations)
        with NoSync():
            packed(batch).loss_sum.backward()


def test_forward_and_backward_need_no_value_of_any_tensor(tiny_model, batch_of, mixed):
    """On the meta device there is none to wait for: reading one raises."""
    packed = PackedModel(tiny_model(), "reference").to("meta")
    packed(batch_of(mixed).to("meta", non_blocking=False)).loss_sum.backward()
    assert all(p.grad is not None for p in packed.parameters())


def test_stock_forward_and_generate_of_a_wrapped_model_are_unchanged(tiny_model, mixed):
    model = tiny_model().eval()
    plain = copy.deepcopy(model)
    PackedModel(model, "reference")
    ids = torch.randint(0, 100, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        for conversation in mixed:
            inputs = conversation.stock_inputs()
            # The patch embedding is a product now, not a convolution: another order of the same sum.
            torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, rtol=1e-4, atol=1e-4)
        settings = dict(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=True)
        assert torch.equal(model.generate(**settings), plain.generate(**settings))


def test_a_wrapped_model_saves_as_a_plain_one(tiny_model, tmp_path, batch_of, mixed):
    from transformers import VideoLlama3ForConditionalGeneration

    model = tiny_model(layers=3)
    packed = PackedModel(model, "reference").eval()
    assert {name.removeprefix("model.") for name in packed.state_dict() if name.startswith("model.")} >= set(
        model.state_dict()
    )
    packed.model.save_pretrained(tmp_path)
    loaded, info = VideoLlama3ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert "vl3_packed" not in (tmp_path / "config.json").read_text()
    with torch.no_grad():
        ours, theirs = packed(batch_of(mixed)), PackedModel(loaded, "reference").eval()(batch_of(mixed))
    assert torch.equal(ours.token_losses, theirs.token_losses)


def test_refuses_what_attention_would_leave_out(tiny_model):
    model = tiny_model()
    model.config.text_config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention_dropout"):
        PackedModel(model, "reference")
    model = tiny_model()
    model.config.text_config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match="sliding"):
        PackedModel(model, "reference")


def test_merging_refuses_sizes_that_are_no_mean_and_counts_that_do_not_fit():
    with pytest.raises(ValueError, match="merge size 3"):
        merge_patches(torch.zeros(9, 2), ((3, 9),))
    with pytest.raises(ValueError, match="4 patches, the batch has 9"):
        merge_patches(torch.zeros(9, 2), ((1, 4),))


def test_head_dims(tiny_model):
    assert head_dims(tiny_model(head_dim=8, vision_head_dim=12)) == (12, 8)
