"""Weights in 4 bits compute what peft's adapters on bitsandbytes' layers compute, and are never kept whole."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.long import first_of
from vl3train.config.choices import AdapterKind, Recompute
from vl3train.config.optim_options import AdapterConfig
from vl3train.model.activations.flops import flop_rates
from vl3train.model.activations.work import recompute_rates
from vl3train.model.adapters import add_adapters
from vl3train.model.kernels.nf4 import dequantize_nf4, quantize_nf4, unpack_nf4
from vl3train.model.layers.nf4_linear import Nf4Linear, hold_in_4_bits, round_to_4_bits
from vl3train.model.packed_forward import PackedModel
from vl3train.model.trainable import count_parameters, set_trainable

RANK = 8
PARTS = ("language_model", "vision_encoder")


def adapted(model, parts=("language_model",), trained=()):
    """Adapters that do something."""
    set_trainable(model, trained)
    add_adapters(model, AdapterConfig(kind=AdapterKind.lora, rank=RANK, parts=list(parts)))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def loss_and_gradients(model, batch, **how):
    model.zero_grad()
    output = PackedModel(model, "reference", **how).train()(batch)
    output.loss_sum.backward()
    return output.loss_sum.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad
    }


def counted(model):
    return count_parameters(model), flop_rates(model), recompute_rates(model, recomputes_logits=True)


def same(found, expected, tolerance):
    assert found[0].item() == pytest.approx(expected[0].item(), rel=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        worst = (found[1][name] - grad).abs().max() / grad.abs().max().clamp(min=1e-3)
        assert worst < tolerance, f"{name}: differs by {worst:.1e} of its largest value"


@pytest.mark.parametrize(
    ("level", "parts"), [(Recompute.nothing, PARTS[:1]), (Recompute.mlp, PARTS), (Recompute.layer, PARTS)]
)
def test_loss_and_gradients_are_those_of_the_dequantized_weights(tiny_model, batch_of, mixed, level, parts):
    batch = batch_of(mixed)
    rounded = tiny_model()
    round_to_4_bits(rounded.requires_grad_(False), parts, torch.float32)
    expected = loss_and_gradients(adapted(rounded, parts), batch)
    held = adapted(tiny_model(), parts)
    counts, flops, work = counted(held)
    assert hold_in_4_bits(held, parts, torch.device("cpu")) == 2 * (7 + 6 * (len(parts) == 2))
    assert counted(held) == (counts, flops, work), "a weight in 4 bits counts like any other"
    same(loss_and_gradients(held, batch, recompute_vision=level, recompute_language=level), expected, 1e-6)


@pytest.mark.parametrize("level", first_of(Recompute.elementwise, Recompute.layer), ids=str)
def test_compiled_layers_fuse_the_adapters_and_keep_no_whole_weight(
    tiny_model, batch_of, mixed, compile_on_cpu, level
):
    held, batch = adapted(tiny_model()), batch_of(mixed)
    weights = {tuple(one.shape) for one in held.model.language_model.layers.parameters() if one.dim() == 2}
    adapters = {tuple(p.shape) for p in held.parameters() if p.requires_grad}
    hold_in_4_bits(held, ["language_model"], torch.device("cpu"))
    expected = loss_and_gradients(held, batch)
    kept = []

    def keep(tensor):
        if tuple(tensor.shape) in weights - adapters:
            kept.append(tensor.shape)
        return tensor

    how = {"recompute_language": level, "compile_layers": True, "gemm_backend": "quack"}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = loss_and_gradients(held, batch, **how)
    assert kept == []
    same(found, expected, 2e-5)


def test_it_computes_what_pefts_adapters_on_bitsandbytes_layers_compute():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = nn.Linear(192, 128, dtype=torch.bfloat16)
    held = nn.ModuleDict({"q_proj": Nf4Linear(linear, torch.device("cpu"))})
    codes, scale_codes, scales, mean = unpack_nf4(held["q_proj"].packed, linear.weight.numel())
    theirs = bnb.nn.Linear4bit(
        192, 128, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True
    )
    theirs.weight = bnb.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    theirs.bias = linear.bias
    theirs = nn.ModuleDict({"q_proj": theirs.to("cpu")})
    state = theirs["q_proj"].weight.quant_state
    assert torch.equal(theirs["q_proj"].weight.flatten(), codes), "the same 4-bit codes"
    # Its quantizer on the CPU takes the level beside the nearest for 0.15 % of the scales: it gets ours.
    assert (state.absmax == scale_codes).float().mean() > 0.99
    state.absmax, state.offset, state.state2.absmax = scale_codes.clone(), mean, scales.clone()

    adapter = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = get_peft_model(theirs, adapter, autocast_adapter_dtype=False)
    ours = nn.ModuleDict({"q_proj": linear})
    get_peft_model(ours, copy.deepcopy(adapter), autocast_adapter_dtype=False)
    ours["q_proj"].base_layer = held["q_proj"]
    for name in ("lora_A", "lora_B"):
        getattr(theirs["q_proj"], name).to(torch.bfloat16)
    ours["q_proj"].load_state_dict(
        {n: p for n, p in wrapped.base_model.model["q_proj"].state_dict().items() if "lora" in n},
        strict=False,
    )
    rows = torch.randn(40, 192, dtype=torch.bfloat16)
    gradients = []
    for layer in (ours["q_proj"], wrapped.base_model.model["q_proj"]):
        inputs = rows.clone().requires_grad_()
        out = layer(inputs)
        out.float().square().sum().backward()
        gradients.append(
            [out.detach(), inputs.grad, layer.lora_A.default.weight.grad, layer.lora_B.default.weight.grad]
        )
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0.01, atol=0.01 * float(other.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_give_bitsandbytes_values_bit_by_bit(dtype):
    functional = pytest.importorskip("bitsandbytes").functional
    weight = (torch.randn(96, 1000, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    weight[0, :64] = 0
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    packed = quantize_nf4(weight)
    own, scale_codes, scales, mean = unpack_nf4(packed, weight.numel())
    assert torch.equal(own[32:], codes.flatten()[32:]), "but for the block of zeros, which has no scale"
    state.absmax, state.offset, state.state2.absmax = scale_codes.clone(), mean, scales.clone()
    found = dequantize_nf4(packed, *weight.shape, dtype, None)
    assert torch.equal(found[1:], functional.dequantize_4bit(codes, state)[1:])
    assert (found - weight).abs().max() < 0.15 * weight.abs().max()
    torch.library.opcheck(dequantize_nf4, (packed, *weight.shape, dtype, weight))


def test_a_weight_of_no_whole_blocks_is_refused():
    with pytest.raises(ValueError, match=r"shape \(3, 7\) is no whole number of blocks of 64"):
        quantize_nf4(torch.zeros(3, 7))
