from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from transformers import VideoLlama3ForConditionalGeneration

from vl3train.config.choices import AdapterKind, Recompute
from vl3train.config.schema import AdapterConfig
from vl3train.model.adapters import add_adapters, load_adapter, merge_adapter, save_adapter
from vl3train.model.packed_forward import PackedModel
from vl3train.model.trainable import parameter_groups, part_of, set_trainable


def lora(*parts, dropout=0.0):
    return AdapterConfig(kind=AdapterKind.lora, parts=list(parts), rank=4, alpha=8, dropout=dropout)


def adapted(model, config, trained):
    """The model with adapters that do something: their second matrix starts at zero."""
    set_trainable(model, trained)
    wrapped = add_adapters(model, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return wrapped


@pytest.mark.parametrize(
    ("parts", "trained", "full"),
    [
        (("language_model",), ["language_model"], set()),
        (
            ("language_model",),
            ["vision_encoder", "projector", "language_model"],
            {"vision_encoder", "projector"},
        ),
        (
            ("language_model", "vision_encoder"),
            ["vision_encoder", "projector", "language_model"],
            {"projector"},
        ),
    ],
)
def test_trains_packed_saves_alone_loads_with_peft_and_merges(
    tiny_model, batch_of, mixed, tmp_path, parts, trained, full
):
    base = tiny_model()
    model = copy.deepcopy(base)
    wrapped = adapted(model, lora(*parts), trained)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert {part_of(n) for n in names} == set(parts) | full
    assert {part_of(n) for n in names if ".lora_" not in n} == full
    groups = parameter_groups(model, dict.fromkeys(trained, 1e-5), 0.0)
    assert {g["name"] for g in groups} == set(trained)
    assert sum(len(g["params"]) for g in groups) == len(names)

    recompute = Recompute.layer
    packed = PackedModel(model, "reference", recompute_vision=recompute, recompute_language=recompute).train()
    packed(batch_of(mixed)).loss_sum.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    packed.eval()

    save_adapter(wrapped, tmp_path / "adapter")
    stored = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert stored < 4 * sum(p.numel() for p in model.parameters() if p.requires_grad) * 1.2 + 20_000
    inputs = [conversation.stock_inputs() for conversation in mixed]
    with torch.no_grad():
        expected = [wrapped(**i).logits for i in inputs]
        assert not torch.allclose(expected[0], base(**inputs[0]).logits, atol=1e-2)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter")).eval()
        for i, logits in zip(inputs, expected, strict=True):
            torch.testing.assert_close(loaded(**i).logits, logits, rtol=1e-4, atol=1e-4)

        merged = merge_adapter(wrapped)
        assert isinstance(merged, VideoLlama3ForConditionalGeneration)
        assert merged.state_dict().keys() == base.state_dict().keys()
        for i, logits in zip(inputs, expected, strict=True):
            torch.testing.assert_close(merged(**i).logits, logits, rtol=1e-4, atol=1e-4)


def test_packed_equals_alone_with_adapters(tiny_model, batch_of, mixed):
    model = tiny_model()
    wrapped = adapted(model, lora("language_model"), ["projector", "language_model"])
    for conversation in mixed:
        if supervised := int((conversation.labels >= 0).sum()):
            (wrapped(**conversation.stock_inputs()).loss * supervised).backward()
    stock = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    wrapped.zero_grad()
    PackedModel(model, "reference")(batch_of(mixed)).loss_sum.backward()
    assert stock.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, stock[name], rtol=1e-3, atol=1e-4)


def test_dropout_is_the_same_when_layers_are_recomputed(tiny_model, batch_of, mixed):
    grads = []
    for recompute in (Recompute.nothing, Recompute.mlp, Recompute.layer):
        model = tiny_model()
        torch.manual_seed(5)
        adapted(model, lora("language_model", dropout=0.5), ["language_model"])
        torch.manual_seed(6)
        packed = PackedModel(
            model, "reference", recompute_vision=recompute, recompute_language=recompute
        ).train()
        packed(batch_of(mixed)).loss_sum.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(grads[0], grads[1])
    torch.testing.assert_close(grads[0], grads[2])


def test_gathered_weights_are_saved_instead_of_the_models_own(tiny_model, tmp_path):
    base = tiny_model()
    model = copy.deepcopy(base)
    wrapped = adapted(model, lora("language_model"), ["projector", "language_model"])
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    save_adapter(wrapped, tmp_path, state_dict=gathered)
    loaded = load_adapter(copy.deepcopy(base), tmp_path, is_trainable=True)
    restored = loaded.get_base_model().state_dict()
    assert all(torch.equal(restored[name], tensor) for name, tensor in gathered.items())
    assert {n for n, p in loaded.get_base_model().named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize(
    ("config", "trained", "message"),
    [
        (AdapterConfig(), ["language_model"], "adapter.kind=none"),
        (lora("projector"), ["projector"], "adapter.parts names projector; adapters go on"),
        (lora(), ["language_model"], "adapter.parts names nothing"),
        (lora("vision_encoder"), ["vision_encoder", "language_model"], "language_model cannot train in full"),
    ],
)
def test_refuses_what_cannot_be_combined(tiny_model, config, trained, message):
    model = tiny_model()
    set_trainable(model, trained)
    with pytest.raises(ValueError, match=message):
        add_adapters(model, config)
