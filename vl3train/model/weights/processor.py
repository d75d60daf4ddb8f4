"""The processor and tokenizer of VideoLLaMA3, built with the pixel budgets of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vl3train.config.data_options import DataConfig
from vl3train.contracts.tokens import (
    CHAT_TEMPLATE,
    END_OF_TEXT,
    IM_END,
    IM_START,
    IMAGE_PAD,
    PATCH_SIZE,
    UPSTREAM_ADDED_TOKENS,
    VIDEO_PAD,
)

HALF = [0.5, 0.5, 0.5]
"""Mean and deviation of pixels, as SigLIP has them: pixels come to [-1, 1]. The class default is the same today."""


def prepare_tokenizer(tokenizer_from: str | Path) -> Any:
    """The tokenizer with every token that VideoLLaMA3 knows; answers end in ``<|im_end|>``.

    Qwen2.5's tokenizer has the two placeholders already, Qwen2's does not. The three tokens after them are the
    original code's (train.py:641), in its order, so that their ids agree with its weights. Raises ValueError for a
    tokenizer of another family, and for one that is damaged.
    """
    from transformers import AutoTokenizer

    # Of a folder that brings code of its own (the original's release), only the tokenizer's files are read.
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_from), trust_remote_code=False)
    except Exception as error:
        if type(error) is not Exception:  # the class of all errors of tokenizers
            raise
        raise ValueError(f"its tokenizer.json cannot be read: {error}") from error
    for reference in ("auto_map", "processor_class"):  # to code that is not in a folder written here
        tokenizer.init_kwargs.pop(reference, None)
    tokenizer.chat_template = CHAT_TEMPLATE
    known = tokenizer.get_vocab()
    if lacking := [token for token in (IM_START, IM_END, END_OF_TEXT) if token not in known]:
        raise ValueError(
            f"tokenizer {tokenizer_from} has no {', '.join(lacking)}; take a Qwen2 or Qwen2.5 tokenizer"
        )
    for token in (IMAGE_PAD, VIDEO_PAD, *UPSTREAM_ADDED_TOKENS):
        if token not in known:
            tokenizer.add_tokens([token], special_tokens=True)
    tokenizer.eos_token = IM_END
    tokenizer.pad_token = END_OF_TEXT
    # generate() continues at the right end of each row, so padding is on the left. save_pretrained writes the initial
    # value only.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    return tokenizer


def build_processor(
    tokenizer_from: str | Path,
    *,
    data: DataConfig | None = None,
    image_merge_size: int = 1,
    video_merge_size: int = 2,
    prune_frames: bool = True,
) -> Any:
    """A ``VideoLlama3Processor`` that renders one image or one clip as training does.

    Args:
        tokenizer_from: Folder or hub name of a Qwen2 tokenizer, or of any folder that holds one.
        data: Pixel budgets and frame rate; None: the published ones.
        image_merge_size: Side of the patch square merged into one visual token of an image.
        video_merge_size: The same for a clip.
        prune_frames: Drop visual tokens of a clip that repeat the frame before.

    transformers divides a clip's pixels among its frames, but has no budget that several items share. It is stored as
    ``image_processor.max_visual_tokens``, and ``vl3train generate`` applies it.
    """
    from transformers import VideoLlama3Processor

    data = data if data is not None else DataConfig()
    return VideoLlama3Processor(
        image_processor=_image_processor(data, image_merge_size),
        tokenizer=prepare_tokenizer(tokenizer_from),
        video_processor=_video_processor(data, video_merge_size, prune_frames),
        chat_template=CHAT_TEMPLATE,
    )


def _image_processor(data: DataConfig, merge_size: int) -> Any:
    from transformers import VideoLlama3ImageProcessor

    processor: Any = VideoLlama3ImageProcessor(
        size=_pixel_budget(data.image_min_pixels, data.image_max_pixels, data.max_visual_tokens, merge_size),
        merge_size=merge_size,
        patch_size=PATCH_SIZE,
        image_mean=HALF,
        image_std=HALF,
    )
    processor.max_visual_tokens = data.max_visual_tokens  # written to processor_config.json, and read back
    return processor


def _video_processor(data: DataConfig, merge_size: int, prune_frames: bool) -> Any:
    from transformers import VideoLlama3VideoProcessor

    processor: Any = VideoLlama3VideoProcessor(
        size=_pixel_budget(data.video_min_pixels, data.video_max_pixels, data.max_visual_tokens, merge_size),
        merge_size=merge_size,
        patch_size=PATCH_SIZE,
        image_mean=HALF,
        image_std=HALF,
        min_frames=data.min_frames,
        max_frames=data.max_frames,
        # A stored fps would make num_frames= an error ("mutually exclusive"), a stored do_sample_frames=True a list
        # of frames. So plain transformers wants fps= or num_frames= with a path, as its own examples have it.
        do_sample_frames=False,
        use_token_compression=prune_frames,
        return_metadata=True,
    )
    processor.trained_fps = data.fps  # read back by trained_fps
    return processor


def trained_fps(processor: Any) -> float:
    """Frames that training sampled from each second of a clip; published processors name none."""
    stored = processor.video_processor
    fps = getattr(stored, "trained_fps", None) or stored.fps  # fps: in folders of earlier builds
    return float(fps) if fps is not None else DataConfig().fps


def keep_arguments_free(processor: Any) -> Any:
    """``processor`` of an earlier build, changed so that fps=, num_frames= and lists of frames work in transformers."""
    stored = processor.video_processor
    stored.trained_fps, stored.fps, stored.do_sample_frames = trained_fps(processor), None, False
    return processor


def _pixel_budget(
    min_pixels: int, max_pixels: int, max_visual_tokens: int, merge_size: int
) -> dict[str, int]:
    """By transformers' names; these "edges" are numbers of pixels."""
    pixels_of_tokens = max_visual_tokens * PATCH_SIZE**2 * merge_size**2
    return {"shortest_edge": min_pixels, "longest_edge": min(max_pixels, pixels_of_tokens)}
