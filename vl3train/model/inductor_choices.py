"""Settings of torch.compile's code generator, inductor. Importing this takes a second: only runs that compile do."""

from __future__ import annotations

from typing import Any

from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

WIDEST_ROW = 2048
"""Norms keep rows of up to this many values in registers; longer rows are read twice. torch's own limit is 1024. The
encoder's rows have 1152 values, the 2B's 1536."""


class _Choices(InductorChoices):
    """torch's choices, except for the length of rows (its docstring says how to override them)."""

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        inner = features.get_reduction_hint() is ReductionHint.INNER and not cooperative_reduction
        if inner and V.graph.sizevars.statically_known_leq(features.reduction_numel, WIDEST_ROW):
            return True
        return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)


def choose_for_wide_rows() -> None:
    """Set the choices above for this whole process."""
    V.set_choices_handler(_Choices())
