from __future__ import annotations

import itertools

import pytest
import torch

from vl3train.model.attention.backends import BACKENDS, Segments, choose_attention, varlen_attention
from vl3train.model.attention.check import exact_attention
from vl3train.model.attention.qkv_op import qkv_attention

CPU = torch.device("cpu")


def random_row(lengths, heads, kv_heads, dim, dtype, device):
    torch.manual_seed(0)
    shapes = (heads, kv_heads, kv_heads)
    q, k, v = (torch.randn(sum(lengths), h, dim, device=device).to(dtype).requires_grad_() for h in shapes)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    return q, k, v, bounds


@pytest.mark.parametrize("lengths", [(4, 4, 4, 7, 1, 1, 4), (9,), (1,)])
@pytest.mark.parametrize(("heads", "kv_heads", "causal"), [(4, 4, False), (4, 2, True)])
def test_reference_is_attention_within_each_segment(lengths, heads, kv_heads, causal):
    q, k, v, bounds = random_row(lengths, heads, kv_heads, 12, torch.float64, CPU)
    segments = Segments(bounds, lengths, 9, "reference")
    out = varlen_attention(q, k, v, segments, causal=causal, scale=0.3)
    expected = exact_attention(q, k, v, lengths, causal=causal, scale=0.3)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), upstream)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, (q, k, v), upstream))


@pytest.mark.parametrize(("heads", "kv_heads", "causal"), [(4, 4, False), (4, 2, True)])
def test_rows_that_hold_queries_keys_and_values_give_the_same(heads, kv_heads, causal):
    """The op of compiled layers, with the reference below it."""
    lengths = (4, 4, 7, 1)
    q, k, v, bounds = random_row(lengths, heads, kv_heads, 12, torch.float32, CPU)
    qkv = torch.cat((q, k, v), 1).flatten(1)
    out, _ = qkv_attention(qkv, bounds, (), 12, heads, 7, "reference", causal, 0.3)
    expected = exact_attention(q, k, v, lengths, causal=causal, scale=0.3).flatten(1)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), upstream)
    exact = torch.autograd.grad(expected, (q, k, v), upstream.double())
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)
    rows = qkv.detach().requires_grad_()
    settings = (bounds, [], 12, heads, 7, "reference", causal, 0.3)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(qkv_attention, (rows, *settings), test_utils=checks)


def test_lengths_that_do_not_fit_are_refused():
    q, k, v, bounds = random_row((3, 5), 2, 2, 8, torch.float32, CPU)
    settings = dict(causal=True, scale=1.0)
    with pytest.raises(ValueError, match="max_seqlen=4 is below the longest segment, 5"):
        varlen_attention(q, k, v, Segments(bounds, (3, 5), 4, "reference"), **settings)
    with pytest.raises(ValueError, match="sum to 7, the row has 8"):
        varlen_attention(q, k, v, Segments(bounds, (3, 4), 5, "reference"), **settings)


def test_auto_takes_what_can_serve_and_says_why():
    choice = choose_attention("auto", CPU, (72, 128), torch.bfloat16)
    assert choice.name == "reference"
    assert "flash_attn_4 needs a CUDA device" in choice.reason


@pytest.mark.parametrize(
    ("requested", "device", "head_dims", "dtype", "reason"),
    [
        ("flash_attn", "cpu", (72,), torch.bfloat16, "needs a CUDA device, not cpu"),
        ("torch_varlen", "cpu", (72,), torch.bfloat16, "needs a CUDA device, not cpu"),
        ("torch_varlen", "cuda", (72,), torch.float32, "needs bfloat16 or float16, not float32"),
        ("torch_varlen", "cuda", (72, 12), torch.bfloat16, r"multiples of 8 up to 256, not \[12\]"),
        (
            "sdpa",
            "cpu",
            (72,),
            torch.float32,
            "one of auto, flash_attn_4, flash_attn, torch_varlen, reference",
        ),
    ],
)
def test_a_backend_that_cannot_serve_is_refused_with_the_reason(requested, device, head_dims, dtype, reason):
    with pytest.raises(ValueError, match=reason):
        choose_attention(requested, torch.device(device), head_dims, dtype)


def test_a_backend_that_is_not_installed_is_refused():
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="is not installed"):
            choose_attention("flash_attn", torch.device("cuda"), (72,), torch.bfloat16)
    else:
        pytest.skip("flash_attn is installed")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "causal"), [(16, 16, 72, False), (12, 2, 128, True), (28, 4, 128, True)]
)
@pytest.mark.parametrize("lengths", [(600, 600, 600, 35, 1), (1, 2047, 130)])
def test_cuda_backends_against_float64(backend, heads, kv_heads, dim, causal, lengths):
    """out, dq, dk and dv: one published kernel had three of them right."""
    cuda = torch.device("cuda")
    try:
        choose_attention(backend, cuda, (dim,), torch.bfloat16)
    except ValueError as error:
        pytest.skip(str(error))
    q, k, v, bounds = random_row(lengths, heads, kv_heads, dim, torch.bfloat16, cuda)
    segments = Segments(bounds, lengths, max(lengths), backend)
    out = varlen_attention(q, k, v, segments, causal=causal, scale=dim**-0.5)
    expected = exact_attention(q, k, v, lengths, causal=causal, scale=dim**-0.5)
    upstream = torch.randn_like(out)
    ours = (out, *torch.autograd.grad(out, (q, k, v), upstream))
    exact = (expected, *torch.autograd.grad(expected, (q, k, v), upstream.double()))
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, exact, strict=True):
        error = ((a.double() - b.double()).norm() / b.double().norm()).item()
        assert error < 0.01, f"{backend} {name}: relative error {error:.4f}"
