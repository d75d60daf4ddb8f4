"""The first held-out samples of each source, with what the encoder sees of them, for the tracker's table of answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from vl3train.contracts.records import Batch
from vl3train.contracts.tokens import PATCH_SIZE
from vl3train.engine.tracking.tracker import ShownAnswer
from vl3train.scoring.predictions import Prediction

FRAMES_SHOWN = 8
"""Of a sample: its first and last, and others evenly between them."""
GAP = 4
"""Pixels between pictures."""


class ShownSamples:
    """Looks at packs that pass by, and keeps the pictures of the first samples of each source."""

    def __init__(self, most: Mapping[int, int]) -> None:
        """``most`` samples of each source, by its number in the recipe."""
        self._left = dict(most)
        self.pictures: dict[tuple[int, str], np.ndarray | None] = {}
        """By source and key of the sample: (h, w, 3) uint8, or None for text alone."""

    def watch(self, batches: Iterable[Batch], *, to_the_end: bool) -> Iterator[Batch]:
        """The same packs, in order; without ``to_the_end`` only until every sample that is to be shown was there."""
        for batch in batches:
            for segment, (source, key) in enumerate(
                zip(batch.segment_sources, batch.segment_keys, strict=True)
            ):
                if self._left.get(source, 0) > 0 and (source, key) not in self.pictures:
                    self._left[source] -= 1
                    self.pictures[source, key] = side_by_side(frames_of(batch, segment))
            yield batch
            if not to_the_end and not any(self._left.values()):
                return

    def rows(self, predictions: Iterable[Prediction], source_names: Sequence[str]) -> list[ShownAnswer]:
        """A row for each answer of the samples that are shown, in the order of the recipe and the samples."""
        order = {
            (source_names[source], key): place for place, (source, key) in enumerate(sorted(self.pictures))
        }
        pictures = {(source_names[source], key): one for (source, key), one in self.pictures.items()}
        shown = [one for one in predictions if (one.source, one.key) in order]
        return [
            ShownAnswer(
                source=one.source,
                key=one.key,
                picture=pictures[one.source, one.key],
                question=one.question,
                expected=one.reference,
                answer=one.prediction,
                scores=one.scores,
            )
            for one in sorted(shown, key=lambda one: (order[one.source, one.key], one.answer_number))
        ]


def frames_of(batch: Batch, segment: int) -> list[np.ndarray]:
    """Up to FRAMES_SHOWN pictures and frames of one sample of a pack on the host, as the encoder sees them.

    They may be those of a prefix that it shares. Frames of which every token is pruned are left out: they look like the
    frame before. Each is (h, w, 3) uint8.
    """
    bounds = np.concatenate([[0], np.cumsum(batch.segment_lengths)])
    places = batch.placeholder_positions.numpy()
    first = next(
        (prefix for prefix, its in enumerate(batch.num_branches) if prefix < segment <= prefix + its), segment
    )
    mine = (bounds[first] <= places) & (places < bounds[segment + 1])
    patches = first_patches(batch.patches_by_merge)[batch.kept.numpy()[mine]]
    ends = np.cumsum(batch.frame_lengths)
    frames = np.unique(np.searchsorted(ends, patches, side="right"))
    shown = (
        frames[np.unique(np.linspace(0, max(len(frames) - 1, 0), FRAMES_SHOWN).astype(int))]
        if len(frames)
        else []
    )
    return [_frame(batch, int(ends[frame] - batch.frame_lengths[frame]), int(ends[frame])) for frame in shown]


def first_patches(patches_by_merge: Sequence[tuple[int, int]]) -> np.ndarray:
    """The first patch of each merged token.

    >>> first_patches([(1, 2), (2, 8)]).tolist()
    [0, 1, 2, 6]
    """
    found, start = [np.zeros(0, int)], 0
    for merge, count in patches_by_merge:
        found.append(np.arange(start, start + count, merge**2))
        start += count
    return np.concatenate(found)


def _frame(batch: Batch, first: int, end: int) -> np.ndarray:
    rows, columns = batch.patch_positions[first:end].numpy().T
    patches = batch.pixel_values[first:end].numpy().reshape(-1, 3, PATCH_SIZE, PATCH_SIZE)
    height, width = int(rows.max()) + 1, int(columns.max()) + 1
    picture = np.zeros((height, width, PATCH_SIZE, PATCH_SIZE, 3), np.uint8)
    picture[rows, columns] = patches.transpose(0, 2, 3, 1)
    return picture.transpose(0, 2, 1, 3, 4).reshape(height * PATCH_SIZE, width * PATCH_SIZE, 3)


def side_by_side(frames: Sequence[np.ndarray]) -> np.ndarray | None:
    """One picture of all, on white, aligned at the top; None of none.

    >>> side_by_side([np.zeros((28, 14, 3), np.uint8), np.zeros((14, 14, 3), np.uint8)]).shape
    (28, 32, 3)
    """
    if not frames:
        return None
    height = max(frame.shape[0] for frame in frames)
    width = sum(frame.shape[1] for frame in frames) + GAP * (len(frames) - 1)
    picture = np.full((height, width, 3), 255, np.uint8)
    left = 0
    for frame in frames:
        picture[: frame.shape[0], left : left + frame.shape[1]] = frame
        left += frame.shape[1] + GAP
    return picture
