"""The options of ``data``, which config/schema.py makes part of a run's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Which samples, and how they are rendered. Published values; transformers' class defaults differ."""

    recipe: str | None = None
    """Recipe name (data_recipes/NAME.yaml) or a path to a recipe file. Unset: the stage's own."""

    root: str = "data"
    """Folder that relative shard folders in a recipe start from."""

    fps: float = 1.0
    """Frames taken from a clip for each of its seconds."""

    min_frames: int = 1
    """Fewest frames of a clip."""

    max_frames: int = 180
    """Most frames of a clip; a longer one is sampled more thinly."""

    max_visual_tokens: int = 10240
    """Visual tokens of one sample before pruning, shared equally by its images and frames (mm_max_length)."""

    image_min_pixels: int = 3136
    """Smaller images are enlarged to this."""

    image_max_pixels: int = 3211264
    """Larger images are shrunk to this (16 384 patches)."""

    video_min_pixels: int = 12544
    """Smaller frames are enlarged to this."""

    video_max_pixels: int = 12845056
    """Pixels of all frames of one clip together (16 384 tokens at merge size 2)."""

    decode_max_pixels: int = 100_000_000
    """A picture whose header says more is refused before it is decoded."""

    decode_max_seconds: float = 7200.0
    """A clip whose header says more is refused before it is decoded."""

    decode_seconds: float = 120.0
    """A sample that takes longer than this to decode is refused, and the process that decodes it is killed."""

    remote_cache: str | None = None
    """Folder that keeps what is read of remote shards (shards.txt). Unset: nothing is kept."""

    remote_cache_bytes: int = 100_000_000_000
    """Most that folder holds, about; what was used longest ago goes first."""

    num_workers: int = 2
    """Decoding processes on each rank; 0 decodes in the training process."""

    max_failed_fraction: float = 0.01
    """The run stops when more than this share of the samples seen so far could not be used."""

    max_consecutive_failed: int = 20
    """The run stops when this many samples in a row could not be used."""

    max_epoch_samples: int | None = 10_000_000
    """Most samples of one virtual epoch, which bounds the memory and time of its plan. A larger mixture goes on in
    the next one where this one ended: every sample still comes in its turn. null: no bound."""

    block_shards: int = 0
    """For shards on remote storage: shards are shuffled, then samples within windows of so many shards, so that a
    node reads few shards at a time. 0 shuffles all samples of a source."""

    plan_cache: str | None = None
    """Folder on each node where plans of long epochs (4 bytes a sample) and the rows of the index (about 200) are
    kept for its processes. Unset: vl3train/plans in the user's folder for caches. May be deleted while no run uses
    it; what no run has used for 90 days is deleted when a run starts."""
