"""What decode processes answer: numbers and JSON, which are read here and never unpickled."""

from __future__ import annotations

from typing import Any

import numpy as np

from vl3train.contracts.records import RenderedSample, SampleError, SampleLengths


def read_sample(
    numbers: bytes,
    *,
    num_tokens: int,
    num_placed: int,
    grids: np.ndarray,
    merge_sizes: np.ndarray,
    **more: Any,
) -> RenderedSample:
    """A sample from the ids, labels, places and masks that a decode process has laid end to end."""
    ids, labels, positions, keep = np.split(
        np.frombuffer(numbers, np.int64), np.cumsum([num_tokens, num_tokens, num_placed])
    )
    num_merged = int((grids.prod(1) // merge_sizes**2).sum())
    if len(keep) != num_merged:
        raise SampleError(f"the decode process answered {len(keep)} merged tokens for {num_merged}")
    return RenderedSample(
        input_ids=ids,
        labels=labels,
        placeholder_positions=positions,
        keep_mask=keep.astype(bool),
        grids=grids,
        merge_sizes=merge_sizes,
        **more,
    )


def read_measured(found: dict[str, Any]) -> tuple[SampleLengths, list[str]] | SampleError:
    """Lengths and remarks of one record, or why it is rejected."""
    if "rejected" in found:
        return SampleError(found["rejected"])
    remarks = found.pop("remarks")
    lists = {name: tuple(found[name]) for name in ("merge_sizes", "kept_tokens")}
    return SampleLengths(**{**found, **lists, "grids": tuple(map(tuple, found["grids"]))}), remarks
