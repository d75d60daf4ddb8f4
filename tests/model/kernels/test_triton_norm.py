"""Kernels are compiled once for packs of all sizes. What they compute: test_ops.py."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton comes with torch for CUDA")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from vl3train.model.kernels.triton_norm import _gelu_backward, _norm_backward  # noqa: E402
from vl3train.model.kernels.triton_rope import _rotate  # noqa: E402


@pytest.mark.parametrize(
    "kernel", [_norm_backward, _gelu_backward, _rotate], ids=lambda kernel: kernel.fn.__name__
)
def test_no_number_of_rows_asks_for_a_compilation_of_its_own(kernel):
    """As triton looks at arguments before it looks for a compiled kernel; no GPU is needed for that."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    look_at = create_function_from_signature(kernel.signature, kernel.params, backend)
    tensor = torch.zeros(4)
    names = [parameter.name for parameter in kernel.params]
    given = {name: tensor if name.islower() else 1 for name in names}
    given |= {name: 1152 for name in ("width", "rotary", "columns") if name in names} | {"num_warps": 4}

    def found(num_rows):
        _, specialization, _ = look_at(**{**given, "num_rows": num_rows})
        return tuple(specialization)

    assert {found(rows) for rows in (1, 15, 16, 4096, 4097)} == {found(16_384)}
    assert ("i32", "D") in found(1), "the width is one number for all packs"
