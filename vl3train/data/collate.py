"""The samples of a pack, laid end to end, become the tensors of one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vl3train.contracts.families import family_rows
from vl3train.contracts.records import Batch, Pack, RenderedSample
from vl3train.contracts.tokens import IGNORE_INDEX, PATCH_VALUES

FILLER_KEY = "filler"
DUMMY_GRID, DUMMY_MERGE = (1, 2, 2), 2


def collate(
    samples: Sequence[RenderedSample], pack: Pack, *, num_loss_chunks: int, num_failed_samples: int = 0
) -> Batch:
    """Lay the samples of one pack end to end on one row; ``contracts.records.Batch`` says how.

    Without samples the row is one filler segment of one token, so that a rank with an empty pack still runs.
    """
    ids = [sample.input_ids for sample in samples] or [np.zeros(1, np.int64)]
    labels = _joined([sample.labels for sample in samples] or [np.full(1, IGNORE_INDEX)])
    segment_lengths = [len(segment) for segment in ids]
    starts = np.concatenate([[0], np.cumsum(segment_lengths)])
    (supervised,) = np.nonzero(labels != IGNORE_INDEX)

    items = [
        item
        for start, sample in zip(starts.tolist(), samples, strict=False)
        for item in _visual_items(sample, start)
    ]
    items.sort(key=lambda item: item.merge_size)  # stable
    merged_starts = np.concatenate([[0], np.cumsum([len(item.keep_mask) for item in items])]).astype(np.int64)
    kept = [np.flatnonzero(item.keep_mask) + start for item, start in zip(items, merged_starts, strict=False)]
    shown = items or [_DUMMY]
    frame_lengths = [h * w for item in shown for t, h, w in [item.grid] for _ in range(t)]
    patches_by_merge: dict[int, int] = {}
    for item in shown:
        patches_by_merge[item.merge_size] = patches_by_merge.get(item.merge_size, 0) + len(item.patches)

    num_branches = branches_of(samples) or [0]
    families = family_rows(segment_lengths, num_branches)

    return Batch(
        input_ids=_tensor(_joined(ids)),
        position_ids=_tensor(
            np.concatenate([np.arange(length) for length in segment_lengths])
            + np.repeat([sample.num_shared_tokens for sample in samples] or [0], segment_lengths)
        ),
        cu_seqlens=_tensor(starts, torch.int32),
        pixel_values=torch.from_numpy(np.concatenate([item.patches for item in shown])),
        patch_positions=_tensor(
            np.concatenate([patch_positions(item.grid, item.merge_size) for item in shown])
        ),
        vision_cu_seqlens=_tensor(np.concatenate([[0], np.cumsum(frame_lengths)]), torch.int32),
        kept=_tensor(_joined(kept)),
        placeholder_positions=_tensor(_joined([item.placeholder_positions for item in items])),
        supervised_positions=_tensor(supervised),
        supervised_labels=_tensor(labels[supervised]),
        supervised_segments=_tensor(np.searchsorted(starts, supervised, "right") - 1),
        prefix_rows=_tensor(families.prefix_rows),
        branch_rows=_tensor(families.branch_rows),
        prefix_bounds=_tensor(families.prefix_bounds, torch.int32),
        branch_bounds=_tensor(families.branch_bounds, torch.int32),
        segment_lengths=tuple(segment_lengths),
        num_branches=tuple(num_branches),
        frame_lengths=tuple(frame_lengths),
        patches_by_merge=tuple(patches_by_merge.items()),
        segment_sources=tuple(sample.source for sample in samples) or (-1,),
        segment_keys=tuple(sample.key for sample in samples) or (FILLER_KEY,),
        num_loss_chunks=num_loss_chunks,
        num_planned_tokens=pack.num_tokens,
        num_failed_samples=num_failed_samples,
    )


def branches_of(samples: Sequence[RenderedSample]) -> list[int]:
    """How many branches of it follow each sample."""
    found = [0] * len(samples)
    prefix = 0
    for number, sample in enumerate(samples):
        if sample.num_shared_tokens:
            assert sample.num_shared_tokens == len(samples[prefix].input_ids), (
                f"{sample.key}: no prefix of it"
            )
            found[prefix] += 1
        else:
            prefix = number
    return found


def patch_positions(grid: tuple[int, int, int], merge_size: int) -> np.ndarray:
    """Row and column of each patch of an item, in merge-block order, the same for every frame.

    >>> patch_positions((1, 2, 4), 2).tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]

    Returns:
        (P, 2) int64
    """
    t, h, w = grid
    blocks = (h // merge_size, merge_size, w // merge_size, merge_size)
    rows_columns = np.indices((h, w)).reshape(2, *blocks).transpose(1, 3, 2, 4, 0)
    return np.tile(rows_columns.reshape(h * w, 2), (t, 1))


class _Item:
    """One visual item, cut out of its sample."""

    __slots__ = ("grid", "keep_mask", "merge_size", "patches", "placeholder_positions")

    def __init__(
        self,
        grid: tuple[int, int, int],
        merge_size: int,
        patches: np.ndarray,
        keep_mask: np.ndarray,
        placeholder_positions: np.ndarray,
    ) -> None:
        self.grid = grid
        self.merge_size = merge_size
        self.patches = patches
        self.keep_mask = keep_mask
        self.placeholder_positions = placeholder_positions


_DUMMY = _Item(
    DUMMY_GRID,
    DUMMY_MERGE,
    np.zeros((4, PATCH_VALUES), np.uint8),
    np.zeros(1, bool),
    np.zeros(0, np.int64),
)


def _visual_items(sample: RenderedSample, start: int) -> list[_Item]:
    """The sample's items; ``start`` is where its segment begins in the row."""
    items = []
    patch = merged = placed = 0
    for (t, h, w), merge_size in zip(sample.grids.tolist(), sample.merge_sizes.tolist(), strict=True):
        num_patches = t * h * w
        keep_mask = sample.keep_mask[merged : merged + num_patches // merge_size**2]
        num_kept = int(keep_mask.sum())
        items.append(
            _Item(
                (t, h, w),
                merge_size,
                sample.patches[patch : patch + num_patches],
                keep_mask,
                sample.placeholder_positions[placed : placed + num_kept] + start,
            )
        )
        patch, merged, placed = patch + num_patches, merged + len(keep_mask), placed + num_kept
    assert (patch, merged, placed) == (
        len(sample.patches),
        len(sample.keep_mask),
        len(sample.placeholder_positions),
    ), f"{sample.key}: grids, patches, keep_mask and placeholders do not agree"
    return items


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *arrays])


def _tensor(array: np.ndarray, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
