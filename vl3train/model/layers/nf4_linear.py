"""A frozen linear layer whose weight is held in 4 bits, and putting a model's layers into that form."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from vl3train.model.kernels.gemm_ops import linear_add, rows_gemm
from vl3train.model.kernels.nf4 import dequantize_nf4, quantize_nf4

LAYERS = {
    "language_model": re.compile(r"(^|\.)language_model\.layers\.\d+\."),
    "vision_encoder": re.compile(r"(^|\.)vision_model\.encoder\.layers\.\d+\."),
}
"""Where the linear layers are that can be held in 4 bits. Embedding, head and projector stay as they are."""


class Nf4Linear(nn.Module):
    """nn.Linear with a frozen weight in 4 bits, dequantized in each forward and backward pass and never kept."""

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        """Quantize the weight of ``linear`` on ``device``, and stay there."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # A buffer that is not saved: a checkpoint of adapters holds none of the base.
        self.register_buffer("packed", quantize_nf4(linear.weight.detach().to(device)), persistent=False)
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(device), requires_grad=False)
        self.packed: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.out_features, self.in_features

    def forward(self, rows: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if torch.is_grad_enabled() and rows.requires_grad:
            return Nf4Product.apply(rows, self.packed, self.bias, self.out_features, None)
        return F.linear(rows, dequantize_nf4(self.packed, *self.shape, rows.dtype, None), self.bias)

    def extra_repr(self) -> str:
        """As nn.Linear says it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, nf4"


def is_frozen(linear: nn.Linear | nn.Conv2d | Nf4Linear) -> bool:
    """Whether its weight does not train."""
    return isinstance(linear, Nf4Linear) or not linear.weight.requires_grad


class Nf4Product(torch.autograd.Function):
    """A matrix product with a weight in 4 bits, of which the bytes are kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, added: Tensor | None
    ) -> Tensor:
        """``rows`` (..., in) -> (..., out), plus ``added`` of that shape, where ``rows`` are (R, in)."""
        ctx.save_for_backward(packed)
        ctx.shape = out_features, rows.shape[-1]
        weight = dequantize_nf4(packed, *ctx.shape, rows.dtype, None)
        return F.linear(rows, weight, bias) if added is None else linear_add(rows, weight, bias, added)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the rows and of what was added."""
        (packed,) = ctx.saved_tensors
        weight = dequantize_nf4(packed, *ctx.shape, grad.dtype, grad)
        added = ctx.needs_input_grad[4]
        return rows_gemm(grad, weight) if added else grad @ weight, None, None, None, grad if added else None


def hold_in_4_bits(hf_model: nn.Module, parts: Sequence[str], device: torch.device) -> int:
    """Put the frozen linear layers of ``parts`` into 4 bits on ``device``, one after the other.

    Call it after add_adapters: an adapter keeps the layer that it is on as its ``base_layer``. Returns the number of
    layers.
    """
    found = [one for one in _linears(hf_model, parts) if not one[2].weight.requires_grad]
    for parent, name, linear in found:
        setattr(parent, name, Nf4Linear(linear, device))
        linear.weight = None  # type: ignore[assignment] # the next one needs its memory
    return len(found)


@torch.no_grad()
def round_to_4_bits(hf_model: nn.Module, parts: Sequence[str], dtype: torch.dtype) -> None:
    """Give the linear layers of ``parts`` the values that ``hold_in_4_bits`` computes with, for a plain model.

    ``dtype`` is the one that it computes in: dequantized weights are rounded to it.
    """
    for _, _, linear in _linears(hf_model, parts):
        packed = quantize_nf4(linear.weight)
        linear.weight.copy_(dequantize_nf4(packed, *linear.weight.shape, dtype, None))


def sizes_in_4_bits(hf_model: nn.Module) -> Iterator[tuple[str, int]]:
    """Names and sizes of the weights in 4 bits, which are no parameters."""
    for name, module in hf_model.named_modules():
        if isinstance(module, Nf4Linear):
            yield f"{name}.weight", module.in_features * module.out_features


def digest_in_4_bits(hf_model: nn.Module) -> str:
    """XXH3 of all weights in 4 bits, 32 hex digits."""
    digest = xxhash.xxh3_128()
    for module in hf_model.modules():
        if isinstance(module, Nf4Linear):
            digest.update(module.packed.cpu().numpy().tobytes())
    return digest.hexdigest()


def _linears(hf_model: nn.Module, parts: Sequence[str]) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Linear layers of the parts' layers but those of adapters, each with its owner and its name there."""
    wanted = [LAYERS[part] for part in parts]
    for path, parent in hf_model.named_modules():
        for name, linear in parent.named_children():
            full = f"{path}.{name}"
            inside = any(pattern.search(full) for pattern in wanted) and ".lora_" not in full
            if type(linear) is nn.Linear and inside:
                yield parent, name, linear
