"""quack's matrix products for Hopper, with what follows them done before their result leaves the chip.

Importing this needs quack-kernels (flash-attn-4 brings it). What each function computes is said in
model/kernels/gemm_ops.py.
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

INTERMEDIATE = 2048
"""Rows of more values than this take the second tile of each pair below: measured for 1152, 1536 and 3584."""


@gemm_epilogue(ops={"bias": RowVecLoad("bias")})
def _bias_and_rows(acc, c, bias):  # quack reads its source
    return {"D": acc + c + bias}


@gemm_epilogue()
def _rows_added(acc, c):
    return {"D": acc + c}


@gemm_epilogue(ops={"bias": RowVecLoad("bias")})
def _bias_added(acc, bias):
    return {"D": acc + bias}


@gemm_epilogue(ops={"table": rotary_cos_sin_load("table"), "bias": RowVecLoad("bias")}, mode="acc_pair")
def _bias_and_turn(acc, table, bias):
    one, other = unpack(acc + bias)
    c, s = unpack(table)
    return {"D": pack(one * c - other * s, other * c + one * s)}


# quack's dgelu_dbias_mod and dswiglu_mod without what they take once more of the product before.
@gemm_epilogue(reduces={"dbias": RowVecReduce("dbias")})
def _gelu_back(acc, c):
    dx, _ = dgelu_tanh_approx(c, acc)
    return {"D": dx, "dbias": dx}


@gemm_epilogue(mode="packed_cd_b16x2")
def _swiglu_back(acc, c):
    x, y = unpack(c)
    dx, dy, _ = dswiglu(x, y, acc)
    return {"D": pack(dx, dy)}


def _tile(rows: int, columns: int, *, alone: bool = False, across: bool = False) -> GemmConfig:
    """A tile of the result, two of which share a column (``across``: a row) of operands; ``alone``: by all warps."""
    return GemmConfig(
        tile_m=rows,
        tile_n=columns,
        pingpong=not alone,
        cluster_m=1 if across else 2,
        cluster_n=2 if across else 1,
        device_capacity=9,
        is_dynamic_persistent=False,
    )


# The best of eight tiles each (benchmarks/log.md). Two groups of warps that take turns, not ``alone``, hide the passes.
_TURNS = _tile(128, 192)
_LARGE = _tile(256, 128, alone=True, across=True)
_GATED_BACKWARD = (_tile(128, 128), _tile(128, 192))
_ROTARY = _tile(192, 128, across=True)


PLANS_KEPT = 512
"""Of each kind of product. quack plans for each number of rows anew and forgets none: packs have thousands of them, and
a plan takes some kilobytes."""
_ACTIVATED = tuple(  # asked for in gemm_act's own words, by which quack remembers them
    linear_act_mod(
        name, gated=gated, has_c=False, has_rowvec=not gated, has_colvec=False, sr=False, has_alpha=False
    )
    for name, gated in (("gelu_tanh_approx", False), ("swiglu", True))
)


def forget_plans() -> None:
    """Let quack plan anew, once there are many plans: some milliseconds, and no kernel is compiled again."""
    caches = [quack.gemm._gemm_plan_cache, quack.gemm_interface._gemm_iface_plan_cache]
    own = (_bias_and_rows, _rows_added, _bias_added, _bias_and_turn, _gelu_back, _swiglu_back)
    for mod in (dgelu_dbias_mod, dswiglu_mod, identity_epi, *own, *_ACTIVATED):
        caches += [mod._plan_cache, mod._call_cache, mod.__dict__.get("_sink_shape_cache", {})]
    for cache in caches:
        if len(cache) > PLANS_KEPT:
            cache.clear()


def linear_rotate_kernel(
    rows: Tensor, weight: Tensor, bias: Tensor, table: Tensor, num_rotated: int
) -> Tensor:
    """As ``vl3train::linear_rotate``."""
    rows, columns = rows.contiguous(), num_rotated * table.shape[1]
    result = rows.new_empty((len(rows), len(weight)))
    rotated, still = slice(0, columns), slice(columns, None)
    given = {"table": table.contiguous(), "bias": bias[rotated]}
    _bias_and_turn.gemm(
        rows, weight[rotated].t(), result[:, rotated], epi_args=given, b_kn=True, **_as(_ROTARY)
    )
    given, tile = {"bias": bias[still]}, _as(_tile_for(rows.shape[1]))
    _bias_added.gemm(rows, weight[still].t(), result[:, still], epi_args=given, b_kn=True, **tile)
    return result


def linear_gelu_kernel(rows: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """As ``vl3train::linear_gelu``."""
    forget_plans()
    intermediate, activated = gemm_act(
        rows.contiguous(),
        weight.t(),
        bias=bias,
        activation="gelu_tanh_approx",
        store_preact=keep,
        tuned=False,
        config=_TURNS,
    )
    return rows.new_empty((0, len(weight))) if intermediate is None else intermediate, activated


def gelu_linear_backward_kernel(
    grad: Tensor, weight: Tensor, intermediate: Tensor, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``vl3train::gelu_linear_backward``."""
    d_intermediate, activated = (
        torch.empty_like(intermediate),
        intermediate.new_empty((recompute * len(intermediate), intermediate.shape[1])),
    )
    num_tiles = -(-len(intermediate) // _TURNS.tile_m)
    sums = intermediate.new_empty((num_tiles, intermediate.shape[1]), dtype=torch.float32)
    epilogue, outputs = (dgelu_dbias_mod, {"postact": activated}) if recompute else (_gelu_back, {})
    outputs["dbias"] = sums
    epilogue.gemm(
        grad.contiguous(), weight, d_intermediate, intermediate, epi_args=outputs, b_kn=True, **_as(_TURNS)
    )
    return d_intermediate, activated, sums.sum(0)


def linear_swiglu_kernel(
    rows: Tensor, gate_weight: Tensor, up_weight: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """As ``vl3train::linear_swiglu``."""
    forget_plans()
    weight = _joined(gate_weight, up_weight)
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
    return _of_halves(rows.contiguous(), _joined(gate_weight, up_weight).t(), "B", rows.shape[1])


def swiglu_linear_backward_kernel(
    grad: Tensor, weight: Tensor, gate_up: Tensor, recompute: bool
) -> tuple[Tensor, Tensor]:
    """As ``vl3train::swiglu_linear_backward``."""
    d_gate_up = torch.empty_like(gate_up)
    activated = gate_up.new_empty((recompute * len(gate_up), weight.shape[1]))
    tile = _as(_GATED_BACKWARD[grad.shape[1] > INTERMEDIATE])
    epilogue, outputs = (dswiglu_mod, {"postact": activated}) if recompute else (_swiglu_back, {})
    epilogue.gemm(grad.contiguous(), weight, d_gate_up, gate_up, epi_args=outputs, b_kn=True, **tile)
    return d_gate_up, activated


def gate_up_rows_grad_kernel(d_gate_up: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """As ``vl3train::gate_up_rows_grad``."""
    return _of_halves(d_gate_up, _joined(gate_weight, up_weight), "B", gate_weight.shape[1])


def gate_up_weights_grad_kernel(d_gate_up: Tensor, rows: Tensor) -> Tensor:
    """As ``vl3train::gate_up_weights_grad``."""
    return _of_halves(d_gate_up.t(), rows.contiguous(), "out", rows.shape[1])


def add_gate_up_weights_grad_kernel(total: Tensor, d_gate_up: Tensor, rows: Tensor) -> None:
    """As ``vl3train::add_gate_up_weights_grad``."""
    rows, tile = rows.contiguous(), _tile_for(rows.shape[1])
    gemm_tuned.fn(d_gate_up.t(), rows, total, config=tile, concat_layout=("out",), add_to_output=True)


def linear_add_kernel(rows: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor) -> Tensor:
    """As ``vl3train::linear_add``."""
    result = added.new_empty(added.shape)
    rows, added = rows.contiguous(), added.contiguous()
    tile = _as(_tile_for(added.shape[1]))
    if bias is None:
        _rows_added.gemm(rows, weight.t(), result, added, epi_args={}, b_kn=True, **tile)
    else:
        _bias_and_rows.gemm(rows, weight.t(), result, added, epi_args={"bias": bias}, b_kn=True, **tile)
    return result


def rows_gemm_kernel(rows: Tensor, weight: Tensor) -> Tensor:
    """As ``vl3train::rows_gemm``."""
    result = rows.new_empty((rows.shape[0], weight.shape[1]))
    tile = _as(_tile_for(min(weight.shape)))
    identity_epi.gemm(rows.contiguous(), weight, result, epi_args={}, b_kn=True, **tile)
    return result


def _of_halves(a: Tensor, b: Tensor, halves: str, width: int) -> Tensor:
    """``a`` @ ``b``: gate and up lie one below the other in ``halves``, B or out, and side by side elsewhere."""
    result = a.new_empty((a.shape[0], b.shape[1]))
    gemm_tuned.fn(a, b, result, config=_tile_for(width), concat_layout=(halves,))
    return result


def _joined(one: Tensor, other: Tensor) -> Tensor:
    """The two (I, W) weights one below the other: as they lie, where they do so already, as in DeepSpeed's buffers."""
    size = one.numel()
    if (
        one.is_contiguous()
        and other.is_contiguous()
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        and other.storage_offset() == one.storage_offset() + size
    ):
        return one.as_strided((2 * len(one), one.shape[1]), (one.shape[1], 1))
    return torch.cat((one, other))


def _tile_for(width: int) -> GemmConfig:
    return _LARGE if width > INTERMEDIATE else _TURNS


def _as(tile: GemmConfig) -> dict[str, Any]:
    """The tile as epilogues of quack take it."""
    return {
        "tile_M": tile.tile_m,
        "tile_N": tile.tile_n,
        "pingpong": tile.pingpong,
        "cluster_M": tile.cluster_m,
        "cluster_N": tile.cluster_n,
    }
