"""Weights in 4 bits: QLoRA's NF4 with quantized scales (arXiv:2305.14314, sections 2 and 3), in bitsandbytes' format.

A weight is quantized in blocks of 64 values: each value becomes one of 16 levels of its block's largest absolute value.
These largest values, less their mean, are quantized to 8 bits in blocks of 256. Together 4.127 bits a value.

One weight is one tensor of bytes, so that it passes through autograd functions and compiled layers like any other:
codes of 4 bits, codes of 8 bits, float32 scales of the blocks of 256, the mean. Quantizing is plain torch: the same
bits on every device, so a resumed run and an export have the weights that were trained on. On a GPU, bitsandbytes'
kernels dequantize; on the CPU the reference here does, which gives the same bits.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from vl3train.contracts.shapes import NF4_BLOCK as BLOCK
from vl3train.contracts.shapes import NF4_SCALE_BLOCK as SCALE_BLOCK

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The 16 levels of NF4: appendix E of the paper."""


def quantize_nf4(weight: Tensor) -> Tensor:
    """The bytes (B,) of a weight (out, in), on its device.

    Raises ValueError unless the number of values is a multiple of 64.
    """
    if weight.numel() % BLOCK:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} is no whole number of blocks of {BLOCK}")
    levels = torch.tensor(LEVELS, device=weight.device)
    blocks = weight.detach().float().reshape(-1, BLOCK)
    largest = blocks.abs().amax(1)
    codes = torch.bucketize(blocks / largest.clamp(min=1e-30)[:, None], _middles(levels)).to(torch.uint8)
    codes = (codes[:, 0::2] << 4) | codes[:, 1::2]
    # In float64 on the host: a GPU adds in another order.
    mean = largest.double().cpu().mean().float().to(weight.device)
    rest = torch.nn.functional.pad(largest - mean, (0, -len(largest) % SCALE_BLOCK)).reshape(-1, SCALE_BLOCK)
    scales = rest.abs().amax(1)
    scale_levels = dynamic_levels().to(weight.device)
    scale_codes = torch.bucketize(rest / scales.clamp(min=1e-30)[:, None], _middles(scale_levels))
    scale_codes = scale_codes.to(torch.uint8).reshape(-1)[: len(largest)]
    padding = scale_codes.new_zeros(
        -(codes.numel() + len(scale_codes)) % 4
    )  # float32 begins at multiples of 4 bytes
    floats = torch.cat((scales, mean.reshape(1))).view(torch.uint8)
    return torch.cat((codes.reshape(-1), scale_codes, padding, floats))


@torch.library.custom_op("vl3train::dequantize_nf4", mutates_args=())
def dequantize_nf4(
    packed: Tensor, rows: int, columns: int, dtype: torch.dtype, after: Tensor | None
) -> Tensor:
    """The weight (rows, columns) of ``quantize_nf4``'s bytes.

    In the backward pass it is not computed before ``after`` exists, the gradient that needs it: torch.compile would
    else keep the result of the forward pass, and a model of whole weights with it (see ``ops.recompute_linear``).
    """
    del after
    if not packed.is_cuda:
        return dequantize_nf4_reference(packed, rows, columns, dtype)
    import bitsandbytes  # noqa: F401 - it defines the ops

    codes, scale_codes, scales, mean = unpack_nf4(packed, rows * columns)
    ops = torch.ops.bitsandbytes
    levels = _levels_on(packed.device)
    largest = ops.dequantize_blockwise(scale_codes, scales, levels, SCALE_BLOCK, torch.float32) + mean
    return ops.dequantize_4bit(codes, largest, BLOCK, "nf4", (rows, columns), dtype)


@dequantize_nf4.register_fake
def _(packed: Tensor, rows: int, columns: int, dtype: torch.dtype, after: Tensor | None) -> Tensor:
    return packed.new_empty((rows, columns), dtype=dtype)


def dequantize_nf4_reference(packed: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """``dequantize_nf4`` in torch's own ops."""
    codes, scale_codes, scales, mean = unpack_nf4(packed, rows * columns)
    # Two values are looked up at once, by their byte: 2 ms for a million values on one core, 5 ms one by one.
    levels = torch.tensor(LEVELS, device=packed.device)
    pairs = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), 1)
    scale_levels = _levels_on(packed.device).index_select(0, scale_codes.int())
    largest = scale_levels * scales.repeat_interleave(SCALE_BLOCK)[: len(scale_codes)] + mean
    values = pairs.index_select(0, codes.int()).reshape(-1, BLOCK)
    return (values * largest[:, None]).to(dtype).reshape(rows, columns)


def whole_weight(weight: Tensor, shape: tuple[int, int], dtype: torch.dtype, after: Tensor | None) -> Tensor:
    """A weight as matrix products take it: dequantized where it is bytes, else as it is."""
    return dequantize_nf4(weight, *shape, dtype, after) if weight.dtype is torch.uint8 else weight


@cache
def dynamic_levels() -> Tensor:
    """The 256 levels of 8-bit scales, sorted: bitsandbytes' dynamic map (arXiv:2110.02861, section 1.3).

    A sign, a power of ten from 1e-6 to 1, and as many equal steps within it as bits are left.
    """
    found = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1)
        found += (10.0 ** (exponent - 6) * (bounds[:-1] + bounds[1:]) / 2).tolist()
        found += (-(10.0 ** (exponent - 6)) * (bounds[:-1] + bounds[1:]) / 2).tolist()
    return torch.tensor(sorted(found))


@cache
def _levels_on(device: torch.device) -> Tensor:
    return dynamic_levels().to(device)


def _middles(levels: Tensor) -> Tensor:
    """Where a value goes to the next level."""
    return (levels[1:] + levels[:-1]) / 2


def unpack_nf4(packed: Tensor, num_values: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes of values, codes of scales, scales, and their mean."""
    blocks = num_values // BLOCK
    floats = packed[-4 * (-(-blocks // SCALE_BLOCK) + 1) :].view(torch.float32)
    return packed[: num_values // 2], packed[num_values // 2 :][:blocks], floats[:-1], floats[-1]
