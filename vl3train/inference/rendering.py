"""How a trained model is shown pictures and words: as in its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl3train.config.checks.ranges import range_problems
from vl3train.config.load import read_config
from vl3train.config.problems import ConfigError
from vl3train.contracts.records import RenderSettings
from vl3train.contracts.shapes import LANGUAGE_MODELS, tower_shapes
from vl3train.data.media.clips import DecodeLimits
from vl3train.data.pipeline import decode_limits, render_settings
from vl3train.data.render.chat_tokens import ChatTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """What turns a question into ids and patches."""

    settings: RenderSettings
    limits: DecodeLimits
    decode_seconds: float
    tokenizer: ChatTokenizer
    tokenizer_dir: Path


def trained_rendering(folder: Path, weights: Path, words: Sequence[str] = ()) -> Rendering:
    """How the training of a model rendered its samples.

    Args:
        folder: a run, one of its checkpoints, or an export. A run says it in its config, an export in its processor.
        weights: the Hugging Face folder that ``folder`` stands for.
        words: options that differ, as of a command: "data.fps=2".

    Raises:
        ConfigError: an option is wrong.
        OSError, ValueError: ``weights`` holds no processor or tokenizer.
    """
    file = run_config(folder)
    of_model = exported_words(weights) if file is None else []
    cfg, found = read_config([*of_model, *words], config_file=file)
    if cfg is not None:
        found += range_problems(cfg)
    if cfg is None or found:
        raise ConfigError(found)
    tokenizer = ChatTokenizer.from_folder(weights)
    return Rendering(
        settings=render_settings(cfg, tokenizer),
        limits=decode_limits(cfg),
        decode_seconds=cfg.data.decode_seconds,
        tokenizer=tokenizer,
        tokenizer_dir=weights,
    )


def run_config(folder: Path) -> Path | None:
    """The config of the run that ``folder`` is, or of the one whose checkpoint it is."""
    places = [
        folder,
        *(folder.resolve().parents[1:2] if folder.resolve().parent.name == "checkpoints" else ()),
    ]
    return next((file for place in places if (file := place / "config.yaml").is_file()), None)


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
