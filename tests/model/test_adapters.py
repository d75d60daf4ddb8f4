from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from transformers import VideoLlama3ForConditionalGeneration

from vl3train.config.choices import AdapterInit, AdapterKind, Base4Bit, Recompute
from vl3train.config.schema import AdapterConfig
from vl3train.contracts.shapes import tower_shapes
from vl3train.model.adapter_targets import adapter_sizes
from vl3train.model.adapters import (
    add_adapters,
    base_state,
    load_adapter,
    merge_adapter,
    round_base,
    save_adapter,
)
from vl3train.model.layers.nf4_linear import hold_in_4_bits
from vl3train.model.packed_forward import PackedModel
from vl3train.model.trainable import count_parameters, parameter_groups, part_of, set_trainable


def lora(*parts, dropout=0.0):
    return AdapterConfig(kind=AdapterKind.lora, parts=list(parts), rank=4, alpha=8, dropout=dropout)


def named(**options):
    return AdapterConfig(kind=AdapterKind.lora, rank=4, **options)


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

        merged, _ = merge_adapter(wrapped)
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


KINDS = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "gaussian": {"init": AdapterInit.gaussian},
    "pissa": {"init": AdapterInit.pissa},
    "pissa fast": {"init": AdapterInit.pissa_niter_16},
    "two layers": {"target_modules": ["q_proj", r".*layers\.1\.mlp\.up_proj"]},
    "ranks": {
        "parts": ["language_model", "vision_encoder"],
        "part_ranks": {"vision_encoder": 2},
        "alpha": 6.0,
    },
    "4 bits": {"base_4bit": Base4Bit.nf4},
    "pissa in 4 bits": {"init": AdapterInit.pissa, "base_4bit": Base4Bit.nf4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_loads_on_its_base_and_merges(tiny_model, batch_of, mixed, tmp_path, kind):
    """As a run does it: the base is written, adapters change, are saved, go on in another process, and are merged."""
    adapter = AdapterConfig(kind=AdapterKind.lora, rank=4, **KINDS[kind])
    model, start = tiny_model(), tiny_model()
    model.requires_grad_(False)
    wrapped = add_adapters(model, adapter)
    base = {name: tensor.clone() for name, tensor in base_state(model).items()}
    assert base.keys() == start.state_dict().keys()
    inputs = mixed[0].stock_inputs()
    with torch.no_grad():
        if "4 bits" not in kind and "dora" not in kind:  # B begins at zero, or PiSSA gives back what it took
            torch.testing.assert_close(wrapped(**inputs).logits, start(**inputs).logits, rtol=1e-3, atol=1e-3)
        if adapter.base_4bit is Base4Bit.nf4:
            hold_in_4_bits(model, adapter.base_4bit_parts, torch.device("cpu"))
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    PackedModel(model, "reference").train()(batch_of(mixed)).loss_sum.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    model.eval()
    save_adapter(wrapped, tmp_path / "adapter")
    (start.load_state_dict(base), round_base(start, tmp_path / "adapter"))
    apart = PeftModel.from_pretrained(copy.deepcopy(start), str(tmp_path / "adapter")).eval()
    again = add_adapters(copy.deepcopy(start).requires_grad_(False), adapter, is_new=False)
    names = {n for n, p in again.named_parameters() if p.requires_grad}
    assert names == {n for n, p in wrapped.named_parameters() if p.requires_grad}
    assert torch.equal(base_state(again.get_base_model())["lm_head.weight"], base["lm_head.weight"])
    with torch.no_grad():
        expected = wrapped(**inputs).logits
        torch.testing.assert_close(apart(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
        merged, lost = merge_adapter(apart, torch.bfloat16)
        torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-3, atol=1e-3)
    assert 0 < lost < 0.5


def test_scales_are_twice_the_input_unless_alpha_says_otherwise(tiny_model):
    for config, scale in [
        ({}, 2.0),
        ({"use_rslora": True}, 2.0),
        ({"alpha": 6.0}, 1.5),
        ({"alpha": 6.0, "use_rslora": True}, 3.0),
        ({"part_ranks": {"language_model": 8}}, 2.0),
        ({"part_alphas": {"language_model": 1.0}}, 0.25),
    ]:
        model = tiny_model().requires_grad_(False)
        add_adapters(model, AdapterConfig(kind=AdapterKind.lora, rank=4, **config))
        linear = model.model.language_model.layers[0].mlp.up_proj
        assert linear.scaling["default"] == pytest.approx(scale)
        assert len(linear.lora_A.default.weight) == (8 if "part_ranks" in config else 4)


def test_what_trains_in_full_beside_adapters_is_counted_once(tiny_model, tmp_path):
    base = tiny_model(tied=False)
    before = count_parameters(base)
    model = copy.deepcopy(base)
    set_trainable(model, ["projector"])
    wrapped = add_adapters(model, AdapterConfig(kind=AdapterKind.lora, rank=4, modules_to_save=["lm_head"]))
    counts = count_parameters(model)
    assert counts["projector"] == (before["projector"][1], before["projector"][1])
    adapters = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    language = before["language_model"][1]
    assert counts["language_model"] == (adapters + base.lm_head.weight.numel(), language + adapters)
    towers = dict(zip(("vision_encoder", "language_model"), tower_shapes(base.config), strict=True))
    assert adapter_sizes(AdapterConfig(rank=4), towers) == {"language_model": adapters}
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    save_adapter(wrapped, tmp_path)
    loaded = load_adapter(copy.deepcopy(base), tmp_path, is_trainable=False)
    assert torch.equal(merge_adapter(loaded)[0].lm_head.weight, base.lm_head.weight + 1)


@pytest.mark.parametrize(
    ("config", "trained", "message"),
    [
        (AdapterConfig(), ["language_model"], "adapter.kind=none"),
        (lora("vision_encoder"), ["vision_encoder", "language_model"], "language_model cannot train in full"),
        (
            named(target_modules=["q_porj"]),
            [],
            "'q_porj', which is no linear layer of language_model; near ones are q_p",
        ),
        (named(target_modules=["fc1"]), [], "'fc1', which is no linear layer of language_model"),
        (named(modules_to_save=["lm_haed"]), [], "'lm_haed', which is no module; near ones are lm_head"),
        (named(modules_to_save=["lm_head"]), [], "head and embedding are one tensor"),
    ],
)
def test_refuses_what_cannot_be_combined(tiny_model, config, trained, message):
    model = tiny_model()
    set_trainable(model, trained)
    with pytest.raises(ValueError, match=message):
        add_adapters(model, config)
