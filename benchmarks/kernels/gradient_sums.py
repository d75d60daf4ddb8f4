"""A micro-batch's gradients into their float32 sums: vl3train's way against torch's own and torch.compile's.

    python -m benchmarks.kernels.gradient_sums            # a Markdown table; needs a GPU

The gradients of one layer of the language model of the 2B, and of one of the encoder. GB/s counts what must be moved:
each gradient once, each sum twice where it is added to and once where it is written.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.norms import milliseconds
from benchmarks.markdown import table_head, table_row
from vl3train.contracts.shapes import ENCODER, LANGUAGE_MODELS
from vl3train.engine.zero.gradient_sums import Pairs, add_gradients, put_gradients
from vl3train.model.compiling import compiled

H, I_H = LANGUAGE_MODELS["2b"].hidden_size, LANGUAGE_MODELS["2b"].intermediate_size
C, I_C = ENCODER.hidden_size, ENCODER.intermediate_size
LAYERS = {
    "2B": [H, 2048 * H, 2048, H * H, H, 2 * I_H * H, I_H * H],
    "encoder": [*(C,) * 10, *(C * C,) * 4, I_C * C, I_C, C * I_C],
}
"""Values of each parameter."""
COPIES = 4
"""Layers at once, so that nothing stays in a cache."""


def one_by_one(act: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Pairs], None]:
    """A call for each gradient."""

    def act_on(pairs: Pairs) -> None:
        for total, gradient in pairs:
            act(total, gradient)

    return act_on


def main() -> None:
    """Two lines for each kind of layer."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print(table_head("layer", "act", "torch, ms", "torch.compile, ms", "vl3train, ms", "GB/s", numbers=4))
    for name, sizes in LAYERS.items():
        pairs = [
            (torch.zeros(size, device="cuda"), torch.randn(size, device="cuda").bfloat16())
            for size in sizes * COPIES
        ]
        for act, plain, own, num_bytes in (
            ("put", torch.Tensor.copy_, put_gradients, 6),
            ("add", torch.Tensor.add_, add_gradients, 10),
        ):
            ways = one_by_one(plain), one_by_one(compiled(plain, enabled=True)), own
            times = [milliseconds(way, (pairs,)) / COPIES for way in ways]
            speed = sum(sizes) * num_bytes / times[-1] / 1e6
            print(table_row(name, act, *(f"{ms:.4f}" for ms in times), f"{speed:.0f}"), flush=True)


if __name__ == "__main__":
    main()
