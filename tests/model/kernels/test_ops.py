"""Gradients of norm and GELU in one pass: against autograd in float64, the kernels against the same in torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from tests.long import first_of
from vl3train.model.kernels.ops import (
    gelu_backward,
    gelu_backward_reference,
    interleave_pairs,
    norm_backward,
    norm_backward_reference,
    recompute_linear,
    rope_cos_sin,
    rotate,
    rotate_reference,
    separate_pairs,
)

EPS = 1e-6
SIZES = [(1, 64), (7, 1152), (300, 64), (7, 1536), (5, 3584)]
INTERPRETED_SIZES = [(1, 64), (7, 72), (200, 24), (1, 1152), (1, 1536), (1, 3584)]
"""Triton's interpreter adds up value by value, in Python. A row that fills its block and one that does not, every case
of each; then programs of several rows, and the model's widths."""
CASES = [
    # gradients, centred, bias, residual, normed recomputed, sums of weights, sums of rows
    (1, True, True, True, True, True, True),
    (3, True, True, True, True, True, False),
    (2, False, False, True, True, True, False),
    (3, False, False, True, False, False, False),
    (1, True, False, False, True, True, True),
    (2, False, True, False, True, True, True),
]


def norm_arguments(num_rows, width, case, device="cpu", dtype=torch.float32):
    """Rows far from centred, weights far from 1."""
    num_grads, centred, bias, residual, recompute, weight_sums, row_sums = case
    torch.manual_seed(num_rows + width)
    rows, *others = torch.randn(5, num_rows, width, device=device)
    rows = (rows * (1 + others[3]) + 1.5).to(dtype)
    weight, bias_W = torch.randn(2, width, device=device)
    return (
        [grad.to(dtype) for grad in others[:num_grads]],
        rows,
        (weight + 1).to(dtype),
        bias_W.to(dtype) if bias else None,
        EPS,
        others[3].to(dtype) if residual else None,
        centred,
        recompute,
        weight_sums,
        row_sums,
    )


def norm_oracle(grads, rows, weight, bias, eps, residual_grad, centred, recompute, weight_sums, row_sums):
    """The same from torch's own norms and autograd, in float64."""
    rows, weight = rows.double().requires_grad_(), weight.double().requires_grad_()
    inputs = [rows, weight]
    if bias is not None:
        bias = bias.double().requires_grad_()
        inputs.append(bias)
    if centred:
        normed = F.layer_norm(rows, weight.shape, weight, bias, eps)
    else:
        normed = F.rms_norm(rows, weight.shape, weight, eps) + (0 if bias is None else bias)
    d_rows, *d_parameters = torch.autograd.grad(normed, inputs, sum(grad.double() for grad in grads))
    sums = d_parameters if weight_sums else []
    if residual_grad is not None:
        d_rows = d_rows + residual_grad.double()
    if row_sums:
        sums = [*sums, d_rows.sum(0)] + ([] if residual_grad is None else [residual_grad.double().sum(0)])
    none = torch.empty(0, rows.shape[1])
    return d_rows, normed.detach() if recompute else none, torch.stack(sums) if sums else none


def gelu_arguments(num_rows, width, device="cpu", dtype=torch.float32):
    torch.manual_seed(num_rows)
    grad, intermediate = torch.randn(2, num_rows, width, device=device)
    return grad.to(dtype), (4 * intermediate).to(dtype)


def rotate_arguments(num_rows, heads, rotated, head_dim, backward, sums, device="cpu", dtype=torch.float32):
    """Rows of ``heads`` heads whose pairs are interleaved, and angles as transformers makes them."""
    torch.manual_seed(num_rows)
    rows = torch.randn(num_rows, heads * head_dim, device=device).to(dtype)
    angles = (9 * torch.randn(num_rows, head_dim // 2, device=device)).repeat(1, 2)
    return rows, rope_cos_sin(angles.cos(), angles.sin()), rotated, backward, sums


GELU_SIZES = [(1, 64), (37, 300), (7, 4304)]
ROTATED = [
    (1, 3, 2, 16, True, True),
    (37, 4, 3, 12, True, True),
    (37, 4, 3, 18, False, False),
    (37, 6, 4, 72, True, True),
    (37, 6, 4, 72, False, False),
    (37, 6, 4, 128, True, False),
    (300, 8, 7, 64, True, True),
]


def rotated_by_transformers(rows, table, num_rotated):
    """transformers' rotation, which has the two of a pair half a head apart."""
    cos, sin = (of_pair.repeat(1, 2) for of_pair in table.unflatten(1, (-1, 2)).unbind(2))
    heads = separate_pairs(rows.t(), table.shape[1]).t().unflatten(1, (-1, table.shape[1]))
    rotary, rest = heads[:, :num_rotated], heads[:, num_rotated:]
    rotated, _ = apply_rotary_pos_emb(rotary, rotary, cos, sin)
    return interleave_pairs(torch.cat((rotated, rest), 1).flatten(1).t(), table.shape[1]).t()


def assert_close(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        if one.numel():
            worst = (one.double() - other.double()).abs().max() / other.double().abs().max()
            assert worst < tolerance, f"differs by {worst:.1e} of the largest value"


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_is_that_of_autograd(size, case):
    arguments = norm_arguments(*size, case)
    assert_close(norm_backward(*arguments), norm_oracle(*arguments), 2e-6)


def test_gelu_is_that_of_autograd():
    grad, intermediate = gelu_arguments(300, 70)
    intermediate_64 = intermediate.double().requires_grad_()
    activated = F.gelu(intermediate_64, approximate="tanh")
    (d_intermediate,) = torch.autograd.grad(activated, intermediate_64, grad.double())
    found = gelu_backward(grad, intermediate)
    assert_close((grad, *found), (d_intermediate, activated.detach(), d_intermediate.sum(0)), 2e-6)


@pytest.mark.parametrize("case", ROTATED, ids=str)
def test_rope_is_that_of_transformers_and_its_backward_that_of_autograd(case):
    rows, table, num_rotated, backward, column_sums = rotate_arguments(*case)
    given = rows.double().requires_grad_()
    expected = rotated_by_transformers(given, table.double(), num_rotated)
    if not backward:
        assert rotate(rows, table, num_rotated, False, False).numel() == 0
        assert_close([rows], [expected.detach()], 2e-6)
        return
    (wanted,) = torch.autograd.grad(expected, given, rows.double())
    sums = rotate(rows, table, num_rotated, True, column_sums)
    expected = wanted.sum(0) if column_sums else wanted.new_empty(0)
    assert_close((rows, sums), (wanted, expected), 2e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_ops_have_the_shapes_of_the_real_ones(case):
    """torch.compile believes register_fake, for any number of rows."""
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(norm_backward, norm_arguments(7, 64, case), test_utils=checks)
    torch.library.opcheck(gelu_backward, gelu_arguments(7, 64), test_utils=checks)
    torch.library.opcheck(rotate, rotate_arguments(*ROTATED[3]), test_utils=checks)
    torch.library.opcheck(rotate, rotate_arguments(*ROTATED[4]), test_utils=checks)
    torch.library.opcheck(rotate, rotate_arguments(*ROTATED[5]), test_utils=checks)
    rows, weight = torch.randn(5, 8), torch.randn(12, 8)
    torch.library.opcheck(recompute_linear, (rows, weight, torch.randn(12), rows), test_utils=checks)


def check_kernels(device, dtype, tolerance, sizes, cases=CASES, rotated=ROTATED, gelu=GELU_SIZES):
    from vl3train.model.kernels.triton_norm import gelu_backward_kernel, norm_backward_kernel
    from vl3train.model.kernels.triton_rope import rotate_kernel

    for case in rotated:
        arguments = rotate_arguments(*case, device, dtype)
        same = arguments[0].clone()
        found, expected = rotate_kernel(*arguments), rotate_reference(same, *arguments[1:])
        assert_close((arguments[0], found), (same, expected), tolerance)
    for size in sizes:
        for case in cases:
            arguments = norm_arguments(*size, case, device, dtype)
            assert_close(norm_backward_kernel(*arguments), norm_backward_reference(*arguments), tolerance)
    for size in gelu:
        grad, intermediate = gelu_arguments(*size, device, dtype)
        same = grad.clone()
        found, expected = (
            gelu_backward_kernel(grad, intermediate),
            gelu_backward_reference(same, intermediate),
        )
        assert_close((grad, *found), (same, *expected), tolerance)


@pytest.mark.parametrize(
    "checks",
    first_of(
        "check_kernels('cpu', torch.float32, 2e-6, INTERPRETED_SIZES[:2], CASES[:2])",
        "check_kernels('cpu', torch.float32, 2e-6, INTERPRETED_SIZES[:2]);"
        "check_kernels('cpu', torch.float32, 2e-6, INTERPRETED_SIZES[2:], CASES[:2], rotated=(), gelu=())",
    ),
    ids=["small", "all"],
)
def test_kernels_interpreted_are_the_formulas(checks):
    """In a process of its own: triton reads the variable when it is imported."""
    triton = pytest.importorskip("triton", reason="triton comes with torch for CUDA")
    if triton.__version__.startswith("3.6"):
        pytest.skip("the interpreter of triton 3.6 cannot count a loop with numpy 2.4's arrays")
    code = f"import torch; from tests.model.kernels.test_ops import CASES, INTERPRETED_SIZES, check_kernels; {checks}"
    environment = dict(os.environ, TRITON_INTERPRET="1")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_on_cuda_are_the_formulas(dtype):
    """bfloat16: both round once, at the end, so they differ by one step of it at most, 1/128 of a value."""
    sizes = [*SIZES, (9000, 1152), (5000, 1536)]
    check_kernels("cuda", dtype, 1e-5 if dtype is torch.float32 else 2**-7, sizes)
