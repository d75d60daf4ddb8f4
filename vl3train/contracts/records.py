"""What passes between the layers: frozen records that carry their shapes.

T tokens, S segments (samples), V visual items (an image or a clip), F frames, P patches, N visual tokens
after pruning, U supervised tokens, C = 588 values a patch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vl3train.contracts.families import doubled_pairs
from vl3train.contracts.redaction import without_keys

if TYPE_CHECKING:  # the plan needs no torch: 0.35 GiB less, and seconds, for the tools that only plan
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderSettings:
    """Everything that decides a sample's ids, patches and lengths. Its fingerprint names an index."""

    image_merge_size: int
    video_merge_size: int
    prune_frames: bool
    fps: float
    min_frames: int
    max_frames: int
    image_min_pixels: int
    image_max_pixels: int
    video_min_pixels: int
    video_max_pixels: int  # of a whole clip, divided among its frames
    max_visual_tokens: int  # of a whole sample before pruning, divided among its images and frames
    tokenizer: str  # sha256 of tokenizer.json
    frame_sampling: str = "transformers"  # or "original"
    stream_supervision: str = "training"  # or "released", "answers"
    grey16: str = "clip"  # or "scale": data/pictures/colours.py
    transparent: str = "drop"  # or "white"
    rules: int = (
        4  # raised when the code that samples, resizes, prunes, renders or measures changes its result
    )

    def fingerprint(self) -> str:
        """Sixteen hex digits that differ whenever a field does."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleLengths:
    """What the plan needs to know of a sample; measured once, in the index pass."""

    num_tokens: int  # T, placeholders included, after pruning
    num_supervised_tokens: int
    num_visual_tokens: int  # N, after pruning
    num_patches: int  # P, all of them: the encoder sees pruned patches too
    grids: tuple[tuple[int, int, int], ...]  # one grid_thw for each visual item, in patches
    merge_sizes: tuple[int, ...]
    kept_tokens: tuple[int, ...]  # visual tokens kept of each item
    modality: str  # "text", "image", "video" or "mixed"
    prefix_tokens: int = (
        0  # up to the last visual token, where none of them is supervised; 0 without visual tokens
    )
    family: int = field(default=0, compare=False)
    """Of data/records/families.py, where there are ``prefix_tokens``; 0 for none. Known only where it was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedSample:
    """One conversation, decoded and tokenized, ready to be laid into a pack."""

    key: str  # shard/member
    source: int  # number of its source in the recipe
    input_ids: np.ndarray  # (T,) int64
    labels: np.ndarray  # (T,) int64, shifted: labels[t] is the id after input_ids[t], or IGNORE_INDEX
    patches: np.ndarray  # (P, C) uint8, merge-block order
    grids: np.ndarray  # (V, 3) int64, patches along time, height, width
    merge_sizes: np.ndarray  # (V,) int64
    keep_mask: np.ndarray  # (M,) bool over the merged tokens of all items, True = kept; keep_mask.sum() == N
    placeholder_positions: np.ndarray  # (N,) int64 into input_ids, in the order of the kept merged tokens
    num_shared_tokens: int = 0
    """Of a branch, which holds what follows its prefix: the tokens of the prefix. It comes behind it in the pack."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """Samples chosen to share a row. ``samples`` are row numbers of the index."""

    samples: tuple[int, ...]
    num_tokens: int  # a prefix that samples share once
    num_patches: int
    num_supervised_tokens: int
    cost: int  # integer work units: see data/plan/plan.py
    families: tuple[int, ...] = ()
    """How many neighbouring samples share each prefix, 1 for one that shares none; empty where none does."""

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """The samples, those that share a prefix together."""
        ends = itertools.accumulate(self.families or (1,) * len(self.samples))
        return [self.samples[first:end] for first, end in itertools.pairwise((0, *ends))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """All that a resume needs of the data side: which step comes next, and in which virtual epoch it lies."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch: the samples of one pack end to end on one row, one segment for each sample.

    Samples that share a prefix are a family: a segment for the prefix, with their visual items, and a branch behind it
    for the rest of each. A prefix is no sample: its source is -1, as a filler's.

    Visual items are ordered by merge size (stable), so that merging is one mean for each size. A pack without
    visual items carries one dummy item of four zero patches, which no placeholder refers to: every rank runs
    the encoder in every micro-batch.
    """

    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64, restarts at 0 in each segment; of a branch at its prefix's length
    cu_seqlens: Tensor  # (S+1,) int32, segment bounds [0, ..., T]
    pixel_values: Tensor  # (P, C) uint8; the model normalises
    patch_positions: Tensor  # (P, 2) int64, row and column of each patch, for the encoder's 2-D RoPE
    vision_cu_seqlens: Tensor  # (F+1,) int32, one segment for each frame
    kept: Tensor  # (N,) int64 into the merged visual tokens of all items
    placeholder_positions: Tensor  # (N,) int64 into input_ids
    supervised_positions: Tensor  # (U,) int64 into input_ids
    supervised_labels: Tensor  # (U,) int64
    supervised_segments: Tensor  # (U,) int64, segment of each supervised token
    prefix_rows: Tensor  # (Q,) int64 into input_ids, the prefixes of all families
    branch_rows: Tensor  # (R,) int64 into input_ids, their branches
    prefix_bounds: Tensor  # (families + 1,) int32 into prefix_rows
    branch_bounds: Tensor  # (families + 1,) int32 into branch_rows
    # Host-side numbers, so that nothing has to read them from the device, which would wait for it.
    segment_lengths: tuple[int, ...]  # S
    num_branches: tuple[int, ...]  # S, how many branches of it follow each segment: contracts/families.py
    frame_lengths: tuple[int, ...]  # F, patches of each frame
    patches_by_merge: tuple[tuple[int, int], ...]  # (merge_size, patches) in item order
    segment_sources: tuple[int, ...]  # S, source number; -1 for filler and prefixes
    segment_keys: tuple[str, ...]  # S
    num_loss_chunks: int  # the same on every rank in one micro-batch, so that ZeRO-3 gathers in step
    num_planned_tokens: int  # what the plan counted for this pack
    num_failed_samples: int = 0

    @property
    def shared_prefixes(self) -> tuple[Tensor, ...]:
        """The tensors of model/attention/shared_prefix.py; empty where there is no family."""
        if not any(self.num_branches):
            return ()
        return self.prefix_rows, self.branch_rows, self.prefix_bounds, self.branch_bounds

    @property
    def doubled_pairs(self) -> int:
        """Twice the pairs of a token and one that it attends to, itself counted half."""
        return doubled_pairs(self.segment_lengths, self.num_branches)

    @property
    def sample_keys(self) -> tuple[str, ...]:
        """Keys of the segments but prefixes and filler."""
        both = zip(self.segment_keys, self.segment_sources, strict=True)
        return tuple(key for key, source in both if source >= 0)

    @property
    def media_keys(self) -> tuple[str, ...]:
        """``sample_keys`` with one for each family: what was read and decoded, or failed, by itself."""
        starts = [i + 1 for i, count in enumerate(self.num_branches) if count]
        others = {row for first in starts for row in range(first + 1, first + self.num_branches[first - 1])}
        numbered = enumerate(zip(self.segment_keys, self.segment_sources, strict=True))
        return tuple(key for i, (key, source) in numbered if source >= 0 and i not in others)

    def to(self, device: Any, non_blocking: bool = True) -> Batch:
        """The same batch with its tensors on ``device``."""
        moved: dict[str, Any] = {
            name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.tensors().items()
        }
        return dataclasses.replace(self, **moved)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; DataLoader calls it by this name."""
        pinned: dict[str, Any] = {name: tensor.pin_memory() for name, tensor in self.tensors().items()}
        return dataclasses.replace(self, **pinned)

    def tensors(self) -> dict[str, Tensor]:
        """What of it lies on a device, by field."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if hasattr(value, "pin_memory")}


class SampleError(ValueError):
    """A sample that is rejected or fails, with the reason. The only error that data/ raises for damaged input.

    Reasons are printed and kept in files: of addresses they have the place only.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(without_keys(reason))


class TooManyFailed(ValueError):  # noqa: N818 - it counts failed samples
    """``data.max_consecutive_failed`` samples of one rank failed one after the other, so the run stops.

    One damaged file is no reason to stop; a folder that went away, or another decoder, is. The message says where the
    keys and reasons are written and what to do.
    """
