"""The options of the section ``data``; config/schema.py has the other sections."""

from __future__ import annotations

from dataclasses import dataclass

from vl3train.config.choices import FrameSampling, Grey16, StreamSupervision, Transparent


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Which samples a run reads, and how they are rendered. Defaults are the published values; those of transformers'
    classes differ."""

    recipe: str | None = None
    """Name of a recipe (data_recipes/NAME.yaml) or path of a recipe file. Unset: the stage's recipe."""

    root: str = "data"
    """Folder that relative paths in a recipe start from."""

    fps: float = 1.0
    """Frames sampled from each second of a clip."""

    frame_sampling: FrameSampling = FrameSampling.transformers
    """Which frames are taken of a clip, and their times: as transformers' processor does, which inference with an
    export uses, or as the original code did, for weights that were trained by it (docs/frame_sampling.md)."""

    min_frames: int = 1
    """Fewest frames of a clip; ``original`` knows no such limit."""

    max_frames: int = 180
    """Most frames of a clip; a longer clip is sampled at a lower rate."""

    stream_supervision: StreamSupervision = StreamSupervision.training
    """What is learned of a streaming record besides its answers. training: the newline after each frame and its
    <|stream_end|>, as the original's training code. released: the first token of the message after a frame, to wait or
    to speak, as many of either, as the original's released processor. answers: nothing (docs/numerics.md)."""

    max_visual_tokens: int = 10240
    """Most visual tokens of one sample before pruning (mm_max_length). Its images and frames share them equally."""

    image_min_pixels: int = 3136
    """Pixels of an image at least; smaller images are enlarged. 16 tokens of (14 x image merge) squared pixels, as the
    original has it: stage 4 says 12544."""

    image_max_pixels: int = 3211264
    """Pixels of an image at most (16 384 patches); larger images are shrunk. max_visual_tokens bounds them too; stage 4
    says what it allows at its merge size, 8028160."""

    video_min_pixels: int = 12544
    """Pixels of a frame at least; smaller frames are enlarged."""

    video_max_pixels: int = 12845056
    """Pixels of all frames of a clip together at most (16 384 tokens at merge size 2)."""

    grey16: Grey16 = Grey16.clip
    """Pictures of 16-bit or other deep grey. ``clip`` shows every value over 255 white, as transformers does. ``scale``
    divides by the largest value of the picture's depth, the smallest of 8, 10, 12, 14 or 16 bits that holds it."""

    transparent: Transparent = Transparent.drop
    """Pictures with transparency. ``drop`` shows the colours behind it, as transformers' load_image does. ``white``
    lays them over white, as its processors from 5.21 on do to PIL pictures (docs/prepare_data.md)."""

    decode_max_pixels: int = 100_000_000
    """Most pixels of a picture. A picture whose header says more is not decoded: the sample is rejected."""

    decode_max_seconds: float = 7200.0
    """Longest clip. A clip whose header says more is not decoded: the sample is rejected."""

    decode_seconds: float = 120.0
    """Most seconds to decode one sample. After that the decoding process is killed and the sample has failed."""

    retry_seconds: float = 60.0
    """How long a shard that was indexed and cannot be read now is tried again before its samples fail, as when a file
    server restarts. A shard that was waited for in vain is not waited for again until it can be read."""

    remote_cache: str | None = None
    """Folder that keeps a copy of what is read from remote shards (shards.txt). Unset: no copy is kept."""

    remote_cache_bytes: int = 100_000_000_000
    """About the most that data.remote_cache holds; the least recently used shards are deleted first."""

    num_workers: int = 2
    """Decoding processes of each rank; 0 decodes in the training process."""

    max_failed_fraction: float = 0.01
    """The run stops when more than this share of its samples so far has failed: could not be read or decoded."""

    max_consecutive_failed: int = 20
    """The run stops when this many samples in a row have failed; records that share a prefix count once."""

    max_epoch_samples: int | None = 10_000_000
    """Most samples of one virtual epoch; it bounds the memory and time of the plan. A larger mixture continues in the
    next virtual epoch, so every sample still comes in its turn. null: no bound."""

    block_shards: int = 0
    """For shards on remote storage. Shards are shuffled, then samples within windows of this many shards, so that a
    node reads few shards at a time. 0: all samples of a source are shuffled together."""

    share_prefix: bool = False
    """Encode and prefill an image or clip once for the records of a source that show it behind the same text: a family
    (docs/families.md). Loss and gradients are those of the separate samples. Off by default: records of one picture
    come in one step, and on a GPU only flash-attn-4 serves it."""

    max_family_records: int = 16
    """Most records that share one prefix in a pack; a larger family is divided."""

    index_dir: str | None = None
    """Folder for the indexes of all sources, for example where shards lie on a read-only mount; `vl3train index` and
    the run need the same. Unset: each index lies in the folder of its shards."""

    plan_cache: str | None = None
    """Folder on each node for plans of long epochs (4 bytes a sample) and rows of the index (about 200 bytes a
    sample), shared by the processes of the node. Unset: vl3train/plans in the user's cache folder. You may delete it
    while no run uses it. When a run starts, it deletes files that no run has used for 90 days."""
