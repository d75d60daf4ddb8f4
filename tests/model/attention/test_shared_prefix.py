"""Branches attend to their prefix and to themselves: outputs and all gradients are those of float64 with a mask."""

from __future__ import annotations

import pytest
import torch

from vl3train.contracts.families import family_rows
from vl3train.model.attention import check as attention_check
from vl3train.model.attention import shared_prefix
from vl3train.model.attention.backends import choose_attention, varlen_attention
from vl3train.model.attention.check import check_kernel, exact_attention, right_attention, segments_of
from vl3train.model.attention.qkv_op import qkv_attention, qkv_attention_backward
from vl3train.model.attention.shared_prefix import PlainKernel

CPU = torch.device("cpu")
ROWS = [
    ((9, 3, 1, 4), (3, 0, 0, 0)),
    ((5, 1, 2, 7, 6, 3), (0, 1, 0, 0, 1, 0)),  # alone, a family of one branch, alone, another
    ((4, 8, 2, 1, 5, 5), (1, 0, 3, 0, 0, 0)),  # a branch longer than its prefix; a prefix of two tokens
]


def draw(lengths, heads, kv_heads, dim, dtype=torch.float32, device=CPU):
    torch.manual_seed(0)
    shapes = (heads, kv_heads, kv_heads)
    return [torch.randn(sum(lengths), h, dim, device=device).to(dtype).requires_grad_() for h in shapes]


def dense(q, k, v, lengths, num_branches, scale):
    """One softmax over the whole row in float64, under a mask that is written out token by token."""
    allowed = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    prefix, left = 0, 0
    for i, count in enumerate(num_branches):
        rows = slice(starts[i], starts[i + 1])
        allowed[rows, rows] = torch.ones(lengths[i], lengths[i]).tril().bool()
        if count:
            prefix, left = i, count
        elif left:
            allowed[rows, starts[prefix] : starts[prefix + 1]] = True
            left -= 1
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(~allowed, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


@pytest.mark.parametrize(("lengths", "num_branches"), ROWS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
def test_output_and_gradients_are_those_of_a_mask(lengths, num_branches, heads, kv_heads):
    q, k, v = draw(lengths, heads, kv_heads, 8)
    out = varlen_attention(
        q, k, v, segments_of(lengths, num_branches, "reference", CPU), causal=True, scale=0.3
    )
    expected = dense(q, k, v, lengths, num_branches, 0.3)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        exact_attention(q, k, v, lengths, num_branches, causal=True, scale=0.3), expected
    )
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), upstream)
    exact = torch.autograd.grad(expected, (q, k, v), upstream.double())
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def test_the_op_traces_with_shared_prefixes():
    lengths, num_branches = ROWS[0]
    qkv = torch.cat(draw(lengths, 4, 2, 8), 1).flatten(1).detach().requires_grad_()
    segments = segments_of(lengths, num_branches, "reference", CPU)
    settings = (segments.cu_seqlens, list(segments.shared), 8, 4, 512, "reference", True, 0.3)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(qkv_attention, (qkv, *settings), test_utils=checks)
    out, log_sum_exp = qkv_attention(qkv, *settings)
    backward = (torch.ones_like(out), qkv, out, log_sum_exp, *settings)
    torch.library.opcheck(
        qkv_attention_backward,
        [x.detach() if torch.is_tensor(x) else x for x in backward],
        test_utils=checks[::2],
    )


def test_a_branch_that_forgets_its_prefix_is_found_wrong(monkeypatch):
    monkeypatch.setattr(attention_check, "LENGTHS", ROWS[0][:1])
    monkeypatch.setattr(attention_check, "FAMILIES", ROWS)
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 16, "causal": True, "dtype": torch.float32}
    assert check_kernel("reference", CPU, **shape, shares_prefix=True).is_right
    monkeypatch.setattr(shared_prefix.torch, "logaddexp", torch.maximum)
    assert not check_kernel("reference", CPU, **shape, shares_prefix=True).is_right


@pytest.mark.parametrize("wrong", ["out", "lse"])
def test_the_backward_pass_needs_the_joint_output_and_the_joint_sum(wrong, monkeypatch):
    """With those of one part alone the gradients are wrong: nothing here passes by chance."""
    lengths, num_branches = ROWS[0]
    q, k, v = draw(lengths, 2, 2, 8)
    original = PlainKernel.attend_backward

    def broken(d_out, qkv, outputs, bounds, longest, causal, scale, d_qkv):
        alone = PlainKernel.attend(*qkv, bounds, longest, causal, scale)
        outputs = (alone[0], outputs[1]) if wrong == "out" else (outputs[0], alone[1])
        original(d_out, qkv, outputs, bounds, longest, causal, scale, d_qkv)

    monkeypatch.setattr(PlainKernel, "attend_backward", staticmethod(broken))
    segments = segments_of(lengths, num_branches, "reference", CPU)
    out = varlen_attention(q, k, v, segments, causal=True, scale=0.3)
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), upstream)
    exact = torch.autograd.grad(dense(q, k, v, lengths, num_branches, 0.3), (q, k, v), upstream.double())
    assert max(float((a - b).abs().max()) for a, b in zip(ours, exact, strict=True)) > 0.01


def test_kernels_without_the_log_sum_exp_are_refused():
    with pytest.raises(
        ValueError, match=r"machine\.attention=flash_attn cannot share .*data\.share_prefix=false"
    ):
        right_attention("flash_attn", None, CPU, (16,), torch.float32, shares_prefix=True)
    assert right_attention("auto", None, CPU, (16,), torch.float32, shares_prefix=True).name == "reference"


def test_rows_of_families():
    rows = family_rows([2, 3, 1, 2, 4], [0, 2, 0, 0, 0])
    assert [array.tolist() for array in rows] == [[2, 3, 4], [5, 6, 7], [0, 3], [0, 3]]
    assert [array.tolist() for array in family_rows([2, 3], [0, 0])] == [[], [], [0], [0]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(12, 2, 128), (28, 4, 128)])
@pytest.mark.parametrize("branches", [(50, 49, 51, 1), (130, 600)])
def test_flash_attn_4_against_float64(heads, kv_heads, dim, branches):
    cuda = torch.device("cuda")
    try:
        choose_attention("flash_attn_4", cuda, (dim,), torch.bfloat16)
    except ValueError as error:
        pytest.skip(str(error))
    lengths, num_branches = (77, 2047, *branches, 300), (0, len(branches), *(0,) * (len(branches) + 1))
    q, k, v = draw(lengths, heads, kv_heads, dim, torch.bfloat16, cuda)
    segments = segments_of(lengths, num_branches, "flash_attn_4", cuda)
    out = varlen_attention(q, k, v, segments, causal=True, scale=dim**-0.5)
    expected = exact_attention(q, k, v, lengths, num_branches, causal=True, scale=dim**-0.5)
    upstream = torch.randn_like(out)
    ours = (out, *torch.autograd.grad(out, (q, k, v), upstream))
    exact = (expected, *torch.autograd.grad(expected, (q, k, v), upstream.double()))
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, exact, strict=True):
        error = ((a.double() - b.double()).norm() / b.double().norm()).item()
        assert error < 0.01, f"{name}: relative error {error:.4f}"
