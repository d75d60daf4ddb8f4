"""Compiled layers fuse adapters into their matrix products, and give what peft's modules give."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.model.conftest import kept_rows
from vl3train.config.choices import AdapterKind, Recompute
from vl3train.config.schema import AdapterConfig
from vl3train.model.adapters import add_adapters
from vl3train.model.attention.check import segments_of
from vl3train.model.kernels import gemm_ops as quack_ops
from vl3train.model.kernels.ops import rope_cos_sin
from vl3train.model.layers import lora_halves
from vl3train.model.layers.lora_dispatch import adapter_of
from vl3train.model.layers.lora_halves import AdaptedNormAttention, AdaptedSwigluMlp, extend_with_b
from vl3train.model.layers.tower import FUNCTIONS_ARE_REPEATED
from vl3train.model.packed_forward import PackedModel
from vl3train.model.trainable import set_trainable

RANK = 8


def adapted_model(tiny_model, trained, alpha=6, rank=RANK):
    """B starts as zeros, and would hide most mistakes."""
    model = tiny_model()
    set_trainable(model, trained)
    config = AdapterConfig(kind=AdapterKind.lora, rank=rank, alpha=alpha, dropout=0.0)
    peft_model = add_adapters(model, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model, peft_model


def loss_and_gradients(model, batch, **how):
    model.zero_grad()
    output = PackedModel(model, "reference", **how).train()(batch)
    output.loss_sum.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.loss_sum.detach(), found


# The attention half, which rotates, does not know the level: each way to rotate is tried as the layer's only forward
# pass and where the layer runs it again.
@pytest.mark.parametrize(
    ("level", "rope_in_product", "kept"),
    # Kept of a layer: gate and up in one, and what SwiGLU gives. Rows or weights beside B are never kept.
    [
        pytest.param(Recompute.nothing, True, 2, marks=pytest.mark.long),
        (Recompute.elementwise, False, 1),
        pytest.param(Recompute.mlp, False, 0, marks=pytest.mark.long),
        pytest.param(Recompute.layer, True, 0, marks=pytest.mark.long),
        pytest.param(Recompute.layer, False, 0, marks=pytest.mark.long),
    ],
    ids=["nothing", "elementwise, rope apart", "mlp, rope apart", "layer", "layer, rope apart"],
)
def test_gradients_are_those_of_pefts_modules_and_no_large_rows_are_kept_that_are_recomputed(
    tiny_model, batch_of, mixed, monkeypatch, compile_on_cpu, level, rope_in_product, kept
):
    model, _ = adapted_model(tiny_model, ["projector", "language_model"])
    batch = batch_of(mixed)
    loss, expected = loss_and_gradients(model, batch)
    assert sum("lora_" in name for name in expected) == 2 * 7 * 2
    ran = []

    def watch(place, name, seen):
        plain = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *args: ran.append(seen(*args)) or plain(*args))

    if rope_in_product:
        monkeypatch.setattr(lora_halves, "ROPE_HEAD_DIMS", (8,))
    watch(quack_ops, "linear_rotate_reference", lambda *_: "rope in the product")
    watch(quack_ops, "swiglu_linear_backward_reference", lambda *args: args[1].shape)
    width, intermediate = model.config.text_config.hidden_size, model.config.text_config.intermediate_size
    # Rows or weights beside B: of down, of gate and up, of q, k, v.
    beside_b = [width + number * RANK for number in (1, 2, 3)]
    with kept_rows(model, {intermediate, 2 * intermediate, *beside_b}) as large:
        how = {"recompute_language": level, "compile_layers": True, "gemm_backend": "quack"}
        found_loss, found = loss_and_gradients(model, batch, **how)
    assert len(large) == 2 * kept
    repeated = FUNCTIONS_ARE_REPEATED or level is not Recompute.layer
    assert [one for one in ran if isinstance(one, torch.Size)] == (
        [(width + RANK, intermediate)] * 2 * repeated
    ), "each layer's MLP, the adapter's rank beside the rows"
    forward_passes = 2 * (1 + (level is Recompute.layer)) * repeated
    assert ran.count("rope in the product") == forward_passes * rope_in_product
    assert found_loss == pytest.approx(loss.item(), rel=1e-6)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        worst = (found[name] - grad).abs().max() / grad.abs().max().clamp(min=1e-3)
        assert worst < 2e-5, f"{name}: differs by {worst:.1e} of its largest value"


def test_the_fake_op_has_the_shape_of_the_real_one():
    weights, b = [torch.randn(6, 4), torch.randn(2, 4)], [torch.randn(6, 3), torch.randn(2, 5)]
    found = extend_with_b(weights, b, 4, None)
    expected = torch.zeros(8, 12)
    expected[:6, :4], expected[6:, :4], expected[:6, 4:7], expected[6:, 7:] = *weights, *b
    assert torch.equal(found, expected)
    torch.library.opcheck(
        extend_with_b, (weights, b, 4, weights[0]), test_utils=("test_schema", "test_faketensor")
    )


def test_only_plain_adapters_that_are_on_are_taken(tiny_model):
    model, peft_model = adapted_model(tiny_model, ["language_model"])
    linear = model.model.language_model.layers[0].mlp.up_proj
    assert adapter_of(linear).scaling == 6 / RANK
    assert adapter_of(linear.base_layer) is None
    with peft_model.disable_adapter():
        assert adapter_of(linear) is None
    linear.lora_dropout["default"] = torch.nn.Dropout(0.1)
    assert adapter_of(linear) is None
    linear.lora_dropout["default"] = torch.nn.Identity()
    linear.base_layer.weight.requires_grad_(True)
    assert adapter_of(linear) is None
    linear.base_layer.weight.requires_grad_(False)
    linear.lora_B["default"].half()
    assert adapter_of(linear) is None
    linear.lora_B["default"].float()
    peft_model.merge_adapter()
    assert adapter_of(linear) is None
    peft_model.unmerge_adapter()
    assert adapter_of(linear) is not None
    model, _ = adapted_model(tiny_model, ["language_model"], rank=4)
    assert adapter_of(model.model.language_model.layers[0].mlp.up_proj) is None, "no multiple of 8"


def drawn(*shape, device, dtype, scale=1.0):
    return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()


def check_mlp(device, dtype, tolerance, recompute):
    """Against the sentence that defines it, in float64: every gradient to a share of its largest value."""
    torch.manual_seed(0)
    width, intermediate, rank, scaling = 256, 512, 16, 0.25
    draw = functools.partial(drawn, device=device, dtype=dtype)
    rows, norm = draw(200, width), draw(width)
    weights = [
        draw(*shape, scale=0.06)
        for shape in ((intermediate, width), (intermediate, width), (width, intermediate))
    ]
    a = [draw(rank, weight.shape[1], scale=0.06) for weight in weights]
    b = [draw(len(weight), rank, scale=0.06) for weight in weights]
    grad = torch.randn(200, width, device=device).to(dtype)
    trained = [rows, *a, *b]
    found = AdaptedSwigluMlp.apply(rows, norm.detach(), 1e-6, recompute, scaling, *weights, *a, *b)
    found = [found, *torch.autograd.grad(found, trained, grad)]

    high = [tensor.detach().double().requires_grad_() for tensor in trained]
    (x, *of_a), of_b = high[:4], high[4:]
    gate, up, down = (weight.detach().double() for weight in weights)
    normed = norm.detach().double() * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    def linear(values, weight, place):
        return values @ weight.t() + scaling * values @ of_a[place].t() @ of_b[place].t()

    activated = torch.nn.functional.silu(linear(normed, gate, 0)) * linear(normed, up, 1)
    expected = x + linear(activated, down, 2)
    expected = [expected, *torch.autograd.grad(expected, high, grad.double())]
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).abs().max() / other.abs().max() < tolerance


@pytest.mark.parametrize("recompute", [False, True])
def test_the_mlp_is_what_it_says(recompute):
    check_mlp("cpu", torch.float32, 1e-5, recompute)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("recompute", [False, True])
def test_the_mlp_on_a_gpu_is_what_it_says(recompute):
    pytest.importorskip("quack", reason="quack is not installed")
    check_mlp("cuda", torch.bfloat16, 0.03, recompute)


def check_attention_of_a_family(device, dtype, tolerance, backend, head_dim):
    """A prefix of 70 rows with branches of 5, 1 and 9, against the same rows apart: outputs and every gradient."""
    torch.manual_seed(0)
    lengths, num_branches, width, rank = (3, 70, 5, 1, 9, 4), (0, 3, 0, 0, 0, 0), 64, 8
    draw = functools.partial(drawn, device=device, dtype=dtype)
    rows, norm = draw(sum(lengths), width), draw(width)
    outs = (4 * head_dim, 2 * head_dim, 2 * head_dim)
    weights = [draw(out, width, scale=0.1).detach() for out in outs]
    biases = [draw(out, scale=0.1).detach() for out in outs]
    a, b = [draw(rank, width, scale=0.1) for _ in outs], [draw(out, rank, scale=0.3) for out in outs]
    positions = torch.cat([torch.arange(n) + (70 if i in (2, 3, 4) else 0) for i, n in enumerate(lengths)])
    angles = positions[:, None] * 0.5 ** torch.arange(head_dim // 2)
    angles = torch.cat((angles, angles), 1).to(device)
    cos_sin = rope_cos_sin(angles.cos().to(dtype), angles.sin().to(dtype))
    trained = [rows, norm, *a, *b]

    def attend(place, lengths, num_branches):
        segments = segments_of(lengths, num_branches, backend, torch.device(device))
        of_segments = segments.cu_seqlens, head_dim, segments.max_seqlen, backend
        _, out = AdaptedNormAttention.apply(
            *(rows[place], norm, 1e-6, cos_sin[place], *of_segments, head_dim**-0.5, 0.5),
            *(*weights, *biases, *a, *b, *segments.shared),
        )
        return out

    everything, prefix = torch.arange(sum(lengths)), torch.arange(3, 73)
    branches = torch.arange(73, 88).split((5, 1, 9))
    apart = torch.cat(
        [torch.arange(3), *(torch.cat((prefix, one)) for one in branches), torch.arange(88, 92)]
    )
    shared_out = attend(everything, lengths, num_branches)
    apart_out = attend(apart, (3, 75, 71, 79, 4), (0,) * 5)
    grads = torch.randn(apart_out.shape, device=device).to(dtype)
    summed = torch.zeros_like(shared_out).index_add(0, apart.to(device), grads)  # a prefix has three in one
    found = [shared_out[apart], *torch.autograd.grad(shared_out, trained, summed)]
    expected = [apart_out, *torch.autograd.grad(apart_out, trained, grads)]
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other.double()).abs().max() / other.double().abs().max() < tolerance


def test_branches_behind_a_prefix_are_what_they_are_apart():
    check_attention_of_a_family("cpu", torch.float32, 1e-5, "reference", 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_branches_on_a_gpu_are_what_they_are_apart():
    pytest.importorskip("quack", reason="quack is not installed")
    pytest.importorskip("flash_attn.cute", reason="flash-attn-4 is not installed")
    check_attention_of_a_family("cuda", torch.bfloat16, 0.05, "flash_attn_4", 128)
