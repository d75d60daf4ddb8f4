"""The kernels of a run: chosen, and checked against float64, before anything is trained with them."""

from __future__ import annotations

from typing import Any, NamedTuple

from vl3train.config.schema import MachineConfig
from vl3train.engine.ranks import Rank
from vl3train.model.attention.backends import KernelChoice
from vl3train.model.attention.check import right_attention
from vl3train.model.kernels.check import choose_gemm_backend
from vl3train.model.kernels.prove import Proving
from vl3train.model.packed_forward import head_dims


class Kernels(NamedTuple):
    """Which libraries compute a run's attention and the matrix products of its compiled layers."""

    attention: KernelChoice
    gemm_backend: KernelChoice

    def remarks(self) -> list[str]:
        """What was chosen and why, a line each."""
        named = (("attention", self.attention), ("matrix products", self.gemm_backend))
        return [f"{what}: {choice.name} ({choice.reason})" for what, choice in named]


def choose_kernels(
    machine: MachineConfig,
    hf_model: Any,
    rank: Rank,
    proving: Proving | None = None,
    *,
    shares_prefix: bool = False,
) -> Kernels:
    """Choose the kernels and check them, those of ``data.share_prefix`` too. All ranks call it.

    What ``proving`` has begun is waited for: its kernels then need no check here.

    Raises RunError on every rank where a kernel that the config asks for cannot be used, or gives wrong results.
    """
    if proving is not None:
        proving.wait()
        rank.barrier()  # one rank of each node has started it
    attention = gemm_backend = KernelChoice("none", "never used: a problem is raised below")
    problem = None
    dtype = next(hf_model.parameters()).dtype
    try:
        attention = right_attention(
            machine.attention.value,
            hf_model.config,
            rank.device,
            head_dims(hf_model),
            dtype,
            shares_prefix=shares_prefix,
        )
        gemm_backend = choose_gemm_backend(
            machine.gemm_backend.value, hf_model.config, rank.device, dtype, compiled=machine.compile_layers
        )
    except ValueError as error:
        problem = str(error)
    rank.agree(problem)
    return Kernels(attention, gemm_backend)
