"""quack: matrix products for Hopper with fused epilogues, computed before the result leaves the chip.

Importing this needs quack-kernels, which flash-attn-4 installs. model/kernels/gemm_ops.py says what each function
computes.
"""

from __future__ import annotations

from typing import Any

import quack.gemm
import quack.gemm_interface
import torch
from quack.activation import dgelu_tanh_approx, dswiglu
from quack.epilogue.frontend import gemm_epilogue
from quack.epilogue.library import dgelu_dbias_mod, dswiglu_mod, identity_epi, linear_act_mod
from quack.epilogue.math import pack, unpack
from quack.epilogue.ops import RowVecLoad, RowVecReduce
from quack.epilogue.rotary import rotary_cos_sin_load
from quack.gemm_config import GemmConfig
from quack.gemm_interface import gemm_act, gemm_tuned
from torch import Tensor

LARGE_HIDDEN_SIZE = 2048
"""Above this hidden size the larger tiles below are used: measured for 1152, 1536 and 3584."""


@gemm_epilogue(ops={"bias": RowVecLoad("bias")})
def _add_bias_and_rows(acc, c, bias):  # no annotations: quack reads the source of these functions
    return {"D": acc + c + bias}


@gemm_epilogue()
def _add_rows(acc, c):
    return {"D": acc + c}


@gemm_epilogue(ops={"bias": RowVecLoad("bias")})
def _add_bias(acc, bias):
    return {"D": acc + bias}


@gemm_epilogue(ops={"cos_sin": rotary_cos_sin_load("cos_sin"), "bias": RowVecLoad("bias")}, mode="acc_pair")
def _add_bias_and_rotate(acc, cos_sin, bias):
    x, y = unpack(acc + bias)
    c, s = unpack(cos_sin)
    return {"D": pack(x * c - y * s, y * c + x * s)}


# quack's dgelu_dbias_mod and dswiglu_mod without the output that recomputes the activation.
@gemm_epilogue(reduces={"dbias": RowVecReduce("dbias")})
def _gelu_backward(acc, c):
    dx, _ = dgelu_tanh_approx(c, acc)
    return {"D": dx, "dbias": dx}


@gemm_epilogue(mode="packed_cd_b16x2")
def _swiglu_backward(acc, c):
    x, y = unpack(c)
    dx, dy, _ = dswiglu(x, y, acc)
    return {"D": pack(dx, dy)}


def _tile(rows: int, columns: int, *, pingpong: bool = True, cluster_along_n: bool = False) -> GemmConfig:
    """A tile of the result. Clusters are of two tiles, along the result's rows or (``cluster_along_n``) columns.

    With ``pingpong`` two groups of warps take turns, so that one computes while the other runs its epilogue.
    """
    return GemmConfig(
        tile_m=rows,
        tile_n=columns,
        pingpong=pingpong,
        cluster_m=1 if cluster_along_n else 2,
        cluster_n=2 if cluster_along_n else 1,
        device_capacity=9,
        is_dynamic_persistent=False,
    )


# Each is the best of eight tiles (benchmarks/log.md).
_SMALL = _tile(128, 192)
_LARGE = _tile(256, 128, pingpong=False, cluster_along_n=True)
_SWIGLU_BACKWARD_SMALL, _SWIGLU_BACKWARD_LARGE = _tile(128, 128), _tile(128, 192)
_ROTARY = _tile(192, 128, cluster_along_n=True)


MAX_PLANS = 512
"""Plans that each of quack's caches may hold. quack makes one for each number of rows and never drops any: packs have
thousands of different numbers, and a plan takes some kilobytes."""
_ACTIVATION_EPILOGUES = (
    tuple(  # with the arguments of gemm_act itself: quack's own objects, whose caches are meant
        linear_act_mod(
            name, gated=gated, has_c=False, has_rowvec=not gated, has_colvec=False, sr=False, has_alpha=False
        )
        for name, gated in (("gelu_tanh_approx", False), ("swiglu", True))
    )
)


def drop_plans() -> None:
    """Empty quack's caches of plans that are full. New plans take some milliseconds; no kernel is compiled again."""
    caches = [quack.gemm._gemm_plan_cache, quack.gemm_interface._gemm_iface_plan_cache]
    own = (_add_bias_and_rows, _add_rows, _add_bias, _add_bias_and_rotate, _gelu_backward, _swiglu_backward)
    for mod in (dgelu_dbias_mod, dswiglu_mod, identity_epi, *own, *_ACTIVATION_EPILOGUES):
        caches += [mod._plan_cache, mod._call_cache, mod.__dict__.get("_sink_shape_cache", {})]
    for cache in caches:
        if len(cache) > MAX_PLANS:
            cache.clear()


def linear_rotate_kernel(
    rows: Tensor, weight: Tensor, bias: Tensor, cos_sin: Tensor, num_rotary: int
) -> Tensor:
    """As ``vl3train::linear_rotate``."""
    rows, columns = rows.contiguous(), num_rotary * cos_sin.shape[1]
    result = rows.new_empty((len(rows), len(weight)))
    rotary, rest = slice(0, columns), slice(columns, None)
    given = {"cos_sin": cos_sin.contiguous(), "bias": bias[rotary]}
    _add_bias_and_rotate.gemm(
        rows, weight[rotary].t(), result[:, rotary], epi_args=given, b_kn=True, **_tile_arguments(_ROTARY)
    )
    given, tile = {"bias": bias[rest]}, _tile_arguments(_tile_for(rows.shape[1]))
    _add_bias.gemm(rows, weight[rest].t(), result[:, rest], epi_args=given, b_kn=True, **tile)
    return result


def linear_gelu_kernel(rows: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """As ``vl3train::linear_gelu``."""
    drop_plans()
    intermediate, activated = gemm_act(
        rows.contiguous(),
        weight.t(),
        bias=bias,
        activation="gelu_tanh_approx",
        store_preact=keep,
        tuned=False,
        config=_SMALL,
    )
    return rows.new_empty((0, len(weight))) if intermediate is None else intermediate, activated


def gelu_linear_backward_kernel(
    grad: Tensor, weight: Tensor, intermediate: Tensor, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``vl3train::gelu_linear_backward``."""
    num_rows, inner = intermediate.shape
    d_intermediate = torch.empty_like(intermediate)
    activated = intermediate.new_empty((recompute * num_rows, inner))
    num_tiles = -(-num_rows // _SMALL.tile_m)
    sums = intermediate.new_empty((num_tiles, inner), dtype=torch.float32)
    epilogue, outputs = (dgelu_dbias_mod, {"postact": activated}) if recompute else (_gelu_backward, {})
    outputs["dbias"] = sums
    tile = _tile_arguments(_SMALL)
    epilogue.gemm(
        grad.contiguous(), weight, d_intermediate, intermediate, epi_args=outputs, b_kn=True, **tile
    )
    return d_intermediate, activated, sums.sum(0)


def linear_swiglu_kernel(
    rows: Tensor, gate_weight: Tensor, up_weight: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """As ``vl3train::linear_swiglu``."""
    drop_plans()
    weight = _concatenated(gate_weight, up_weight)
    gate_up, activated = gemm_act(
        rows.contiguous(),
        weight.t(),
        activation="swiglu",
        store_preact=keep,
        tuned=False,
        config=_tile_for(rows.shape[1]),
        concat_layout=("B",),
    )
    return rows.new_empty((0, len(weight))) if gate_up is None else gate_up, activated


def gate_up_kernel(rows: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """As ``vl3train::recompute_gate_up``."""
    return _gate_up_gemm(rows.contiguous(), _concatenated(gate_weight, up_weight).t(), "B", rows.shape[1])


def swiglu_linear_backward_kernel(
    grad: Tensor, weight: Tensor, gate_up: Tensor, recompute: bool
) -> tuple[Tensor, Tensor]:
    """As ``vl3train::swiglu_linear_backward``."""
    d_gate_up = torch.empty_like(gate_up)
    activated = gate_up.new_empty((recompute * len(gate_up), weight.shape[1]))
    is_large = grad.shape[1] > LARGE_HIDDEN_SIZE
    tile = _tile_arguments(_SWIGLU_BACKWARD_LARGE if is_large else _SWIGLU_BACKWARD_SMALL)
    epilogue, outputs = (dswiglu_mod, {"postact": activated}) if recompute else (_swiglu_backward, {})
    epilogue.gemm(grad.contiguous(), weight, d_gate_up, gate_up, epi_args=outputs, b_kn=True, **tile)
    return d_gate_up, activated


def gate_up_rows_grad_kernel(d_gate_up: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """As ``vl3train::gate_up_rows_grad``."""
    return _gate_up_gemm(d_gate_up, _concatenated(gate_weight, up_weight), "B", gate_weight.shape[1])


def gate_up_weights_grad_kernel(d_gate_up: Tensor, rows: Tensor) -> Tensor:
    """As ``vl3train::gate_up_weights_grad``."""
    return _gate_up_gemm(d_gate_up.t(), rows.contiguous(), "out", rows.shape[1])


def add_gate_up_weights_grad_kernel(total: Tensor, d_gate_up: Tensor, rows: Tensor) -> None:
    """As ``vl3train::add_gate_up_weights_grad``."""
    rows, tile = rows.contiguous(), _tile_for(rows.shape[1])
    gemm_tuned.fn(d_gate_up.t(), rows, total, config=tile, concat_layout=("out",), add_to_output=True)


def linear_add_kernel(rows: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor) -> Tensor:
    """As ``vl3train::linear_add``."""
    result = added.new_empty(added.shape)
    rows, added = rows.contiguous(), added.contiguous()
    tile = _tile_arguments(_tile_for(added.shape[1]))
    if bias is None:
        _add_rows.gemm(rows, weight.t(), result, added, epi_args={}, b_kn=True, **tile)
    else:
        _add_bias_and_rows.gemm(rows, weight.t(), result, added, epi_args={"bias": bias}, b_kn=True, **tile)
    return result


def rows_gemm_kernel(rows: Tensor, weight: Tensor) -> Tensor:
    """As ``vl3train::rows_gemm``."""
    result = rows.new_empty((rows.shape[0], weight.shape[1]))
    tile = _tile_arguments(_tile_for(min(weight.shape)))
    identity_epi.gemm(rows.contiguous(), weight, result, epi_args={}, b_kn=True, **tile)
    return result


def _gate_up_gemm(a: Tensor, b: Tensor, concatenated: str, hidden_size: int) -> Tensor:
    """``a`` @ ``b``. In ``concatenated``, "B" or "out", gate lies above up; elsewhere they lie side by side."""
    result = a.new_empty((a.shape[0], b.shape[1]))
    gemm_tuned.fn(a, b, result, config=_tile_for(hidden_size), concat_layout=(concatenated,))
    return result


def _concatenated(gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """Both weights (I, W) one below the other (2 I, W): a view where they lie so already, as in DeepSpeed's buffers."""
    if (
        gate_weight.is_contiguous()
        and up_weight.is_contiguous()
        and gate_weight.untyped_storage().data_ptr() == up_weight.untyped_storage().data_ptr()
        and up_weight.storage_offset() == gate_weight.storage_offset() + gate_weight.numel()
    ):
        width = gate_weight.shape[1]
        return gate_weight.as_strided((2 * len(gate_weight), width), (width, 1))
    return torch.cat((gate_weight, up_weight))


def _tile_for(hidden_size: int) -> GemmConfig:
    return _LARGE if hidden_size > LARGE_HIDDEN_SIZE else _SMALL


def _tile_arguments(tile: GemmConfig) -> dict[str, Any]:
    """The tile as the ``gemm`` of quack's epilogues takes it."""
    return {
        "tile_M": tile.tile_m,
        "tile_N": tile.tile_n,
        "pingpong": tile.pingpong,
        "cluster_M": tile.cluster_m,
        "cluster_N": tile.cluster_n,
    }
