"""From pixels to encoder patches, and which visual tokens of a clip repeat the frame before.

Equal to transformers' ``VideoLlama3ImageProcessor`` and ``VideoLlama3VideoProcessor`` but for the last step:
patches stay uint8, the model brings them to [-1, 1]. That is four times less to move between processes.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from vl3train.contracts.tokens import PATCH_SIZE, PATCH_VALUES
from vl3train.data.media.resampling import cut_into_patches, resample_into_patches, resampling

PRUNE_THRESHOLD = 0.1
"""Mean difference of a visual token's pixels in [-1, 1], times 255: 0.05 of a grey level (upstream's
``threshold``, videollama3_arch.py:202-268; not an option in transformers either)."""


def resize(frames: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(t, h, w, 3) uint8 at the size of ``grid`` patches: bicubic with antialias on uint8, as torchvision's."""
    height, width = grid[0] * PATCH_SIZE, grid[1] * PATCH_SIZE
    if frames.shape[1:3] == (height, width):
        return frames
    flat = np.ascontiguousarray(frames).reshape(-1)
    # torch wants it writable, and strides of its own: numpy's of a single frame may be 0, and it would not see
    # that channels are last. For that it has a kernel, twice as fast and equal to the bit.
    pixels = torch.from_numpy(flat if flat.flags.writeable else flat.copy()).view(frames.shape)
    resized = F.interpolate(
        pixels.permute(0, 3, 1, 2), size=(height, width), mode="bicubic", align_corners=False, antialias=True
    )
    return resized.permute(0, 2, 3, 1).numpy()


def resize_and_patchify(
    picture: np.ndarray, *, grid: tuple[int, int], merge_size: int, out: np.ndarray | None = None
) -> np.ndarray:
    """Resize, then cut into patches; in one pass where the size changes little, as that of most images does.

    Args:
        picture: (h, w, 3) or (t, h, w, 3) uint8.
        grid: Patches along height and width, both divisible by ``merge_size``.
        merge_size: Side of the square of patches that are neighbours in the result.
        out: Where the result is written, contiguous; None: a new array.

    Returns:
        (t * grid_h * grid_w, 588) uint8 in merge-block order: frame, block row, block column, row in
        the block, column in the block; the values of a patch by channel, row, column.
    """
    frames = picture.reshape(-1, *picture.shape[-3:])
    if out is None:
        out = np.empty((len(frames) * grid[0] * grid[1], PATCH_VALUES), np.uint8)
    assert out.flags.c_contiguous, "or else reshape would copy, and the copy be filled"
    rows = resampling(frames.shape[1], grid[0] * PATCH_SIZE)
    columns = resampling(frames.shape[2], grid[1] * PATCH_SIZE)
    for frame, patches in zip(frames, out.reshape(len(frames), -1, PATCH_VALUES), strict=True):
        if frame.shape[:2] == (grid[0] * PATCH_SIZE, grid[1] * PATCH_SIZE):
            cut_into_patches(frame, merge_size, patches)
        elif rows and columns and columns.long_runs:
            resample_into_patches(frame, rows, columns, merge_size, patches)
        else:
            cut_into_patches(resize(frame[None], grid)[0], merge_size, patches)
    return out


def prune_mask(patches: np.ndarray, grid: tuple[int, int, int], merge_size: int) -> np.ndarray:
    """Which visual tokens of a clip are kept: those that differ from the same place of the frame before.

    The whole first frame is kept, and the first token of a frame that would lose all. The comparison is exact
    in integers: ``2 * mean > 0.1`` over n values is ``20 * sum > n``.

    Args:
        patches: (t * h * w, 588) uint8 in merge-block order.
        grid: Patches along time, height, width.
        merge_size: Side of the square of patches merged into one visual token.

    Returns:
        (t * h * w / merge_size**2,) bool, True = kept.
    """
    num_frames, values = grid[0], PATCH_VALUES * merge_size**2
    if num_frames == 1:
        return np.ones(len(patches) // merge_size**2, bool)
    change = _change(patches, grid, merge_size)
    kept = np.ones((num_frames, change.shape[1]), bool)
    kept[1:] = change * round(2 / PRUNE_THRESHOLD) > values
    kept[~kept.any(axis=1), 0] = True
    return kept.reshape(-1)


def prune_to_count(
    patches: np.ndarray, grid: tuple[int, int, int], merge_size: int, count: int
) -> np.ndarray:
    """The mask that keeps exactly ``count`` tokens: those that changed most, whoever decoded the pixels.

    Another decoder may round otherwise than the one that measured the plan; the plan's count stays. As in
    ``prune_mask`` the first frame is kept whole and every frame keeps one token, here its most changed one
    where any changed. Of equal changes the earlier token is kept.

    Raises:
        ValueError: ``count`` is less than the first frame and one token for each other, or over all of them.
    """
    mask = prune_mask(patches, grid, merge_size)
    if int(mask.sum()) == count:
        return mask
    per_frame = len(mask) // grid[0]
    if not per_frame + grid[0] - 1 <= count <= len(mask):
        raise ValueError(f"cannot keep {count} of {len(mask)} visual tokens in {grid[0]} frames")
    change = _change(patches, grid, merge_size)
    kept = np.zeros((grid[0], per_frame), bool)
    kept[0] = True
    kept[np.arange(1, grid[0]), change.argmax(axis=1)] = True
    order = np.argsort(-change.reshape(-1), kind="stable") + per_frame
    order = order[~kept.reshape(-1)[order]]
    kept.reshape(-1)[order[: count - int(kept.sum())]] = True
    return kept.reshape(-1)


def _change(patches: np.ndarray, grid: tuple[int, int, int], merge_size: int) -> np.ndarray:
    """(t - 1, tokens of a frame) int64: sum of absolute differences to the frame before."""
    tokens = patches.reshape(grid[0], -1, PATCH_VALUES * merge_size**2)
    sums = np.empty((grid[0] - 1, tokens.shape[1]), np.int64)
    for frame in range(1, grid[0]):  # frame by frame: a clip's differences at once would not fit the cache
        now, before = tokens[frame], tokens[frame - 1]
        sums[frame - 1] = (np.maximum(now, before) - np.minimum(now, before)).sum(axis=1, dtype=np.int64)
    return sums
