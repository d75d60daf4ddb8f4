"""Kinds of GPU kernels, and of torch's operations on a CPU, by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable

KINDS: tuple[tuple[str, str], ...] = (
    ("collectives", r"nccl|allreduce|all_reduce|reduce_scatter|all_gather|gloo|c10d"),
    ("optimizer and sums of gradients", r"adam|multi_tensor_apply|foreach|lpnorm|clip_grad"),
    ("loss", r"log_softmax|nll_loss|cross_entropy|logsumexp|cunn_softmax|argmax|nllloss"),
    ("attention", r"flash|fmha|attention|varlen"),
    (
        "matrix products",
        r"gemm|nvjet|cutlass|cublas|splitk|triton_(tem|mm)|aten::(addmm|mm|bmm)$|xmma|convolution",
    ),
    ("norms", r"layer_?norm|rms_?norm|norm_backward|gammabeta|triton_.*rsqrt"),
    ("compiled: activations", r"^triton_.*(gelu|tanh|silu|sigmoid)"),
    ("compiled: heads filled up", r"^triton_.*constant_pad"),
    ("compiled: rest", r"^triton_"),
    (
        "casts and copies",
        r"memcpy|memset|copy|catarray|aten::cat|contiguous|fill|aten::pad|zero_|aten::clone",
    ),
    ("embedding and index", r"index|gather|scatter|embedding|masked"),
    ("reductions", r"reduce_kernel|aten::(sum|mean|max|min|any|all|linalg)|sumbackward|meanbackward"),
    (
        "activations and elementwise",
        r"element|vectorized|unrolled|gelu|silu|swiglu|sigmoid|rope|rotary|normal_"
        r"|_rotate|aten::(add|mul|sub|div|neg|pow|tanh|cos|sin|exp|where|clamp|eq|ne|lt|ge|arange|_local_scalar)",
    ),
    (
        "bookkeeping on the host",
        r"^PythonDispatch|Backward\d*$|^autograd::|^torch::autograd|^aten::|^vl3train::",
    ),
)
"""(kind, pattern): the first pattern that is found in a name gives its kind. Compiled kernels carry the names of
what was fused into them (triton_red_fused_native_layer_norm_...), so norms come before the rest of them."""

UNMATCHED = "not matched"


def kind_of(name: str) -> str:
    """The kind of one kernel or operation.

    >>> kind_of("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNN"), kind_of("triton_poi_fused_mul_silu_3")
    ('matrix products', 'compiled: activations')
    """
    for kind, pattern in KINDS:
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return UNMATCHED


def union_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds in which at least one (start, end) runs.

    >>> union_seconds([(0, 2), (1, 3), (5, 6)])
    4.0
    """
    total, reached = 0.0, -float("inf")
    for start, end in sorted(spans):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total
