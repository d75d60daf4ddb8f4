"""Gradients come into their sums whole, whatever their format and size."""

from __future__ import annotations

import pytest
import torch

from vl3train.engine import gradient_sums
from vl3train.engine.gradient_sums import add_gradients, put_gradients


def pairs(device, sizes):
    torch.manual_seed(0)
    return [(torch.randn(size, device=device), torch.randn(size, device=device).bfloat16()) for size in sizes]


def check(device, sizes):
    for act, keeps in ((put_gradients, 0), (add_gradients, 1)):
        given = pairs(device, sizes)
        wanted = [keeps * total.double() + gradient.double() for total, gradient in given]
        act(given)
        for (total, _), expected in zip(given, wanted, strict=True):
            torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)
        act([])


def test_sums_on_a_cpu():
    check("cpu", (1, 7, 4096, 5000))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_sums_on_a_gpu():
    """Sums that begin anywhere, as in DeepSpeed's flat buffers, and both ways to add."""
    large = gradient_sums.LARGE
    check("cuda", (1, 7, 4096, large - 1, large, large + 3))
    flat = torch.randn(2 * large + 9, device="cuda")
    before, gradient = flat.clone(), torch.randn(large + 1, device="cuda").bfloat16()
    add_gradients([(flat[3 : large + 4], gradient)])
    before[3 : large + 4] += gradient.float()
    assert torch.equal(flat, before)
