"""The config with which the samples of a recipe are rendered for a model that comes without its run: an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vl3train.contracts.shapes import LANGUAGE_MODELS, tower_shapes


def exported_words(folder: Path) -> list[str]:
    """Options, as words of a command, that render samples as the processor in a Hugging Face ``folder`` does.

    A processor says neither data.frame_sampling nor how odd pictures are read (data.grey16, data.transparent): these
    keep their defaults, and whoever trained with others adds them.
    """
    from transformers import AutoConfig, AutoProcessor

    from vl3train.model.weights.processor import trained_fps

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    processor: Any = AutoProcessor.from_pretrained(str(folder), trust_remote_code=False)
    images, clips = processor.image_processor, processor.video_processor
    _, shape = tower_shapes(config)
    size = next((name for name, known in LANGUAGE_MODELS.items() if known == shape), "debug")
    words = [
        "stage=4",
        f"model={size}",
        f"stage.image_merge_size={images.merge_size}",
        f"stage.video_merge_size={clips.merge_size}",
        f"stage.prune_frames={str(bool(clips.use_token_compression)).lower()}",
        f"data.fps={trained_fps(processor)}",
        f"data.min_frames={clips.min_frames}",
        f"data.max_frames={clips.max_frames}",
        f"data.image_min_pixels={images.size['shortest_edge']}",
        f"data.image_max_pixels={images.size['longest_edge']}",
        f"data.video_min_pixels={clips.size['shortest_edge']}",
        f"data.video_max_pixels={clips.size['longest_edge']}",
    ]
    # Only our processors have a budget that the items of a sample share.
    if budget := getattr(images, "max_visual_tokens", None):
        words.append(f"data.max_visual_tokens={budget}")
    return words
