"""Integer arithmetic of sizes: how large a picture becomes, which frames are taken, how many tokens.

Equal to transformers' ``VideoLlama3Processor`` (tests/contracts/test_geometry.py).
"""

from __future__ import annotations

import math

from vl3train.contracts.tokens import PATCH_SIZE


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Height and width, divisible by ``factor``, within the pixel limits, at about the same aspect ratio.

    The rule of transformers' ``smart_resize`` (image_processing_video_llama_3.py). ``max_pixels`` wins over
    ``min_pixels``.

    >>> smart_resize(1080, 1920, factor=14, min_pixels=3136, max_pixels=3211264)
    (1078, 1918)
    """
    if max(height, width) / min(height, width) > 200:
        raise ValueError(f"aspect ratio of {width}x{height} is over 200; crop the picture")
    resized_height = round(height / factor) * factor
    resized_width = round(width / factor) * factor
    if resized_height * resized_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        resized_height = max(factor, math.floor(height / shrink / factor) * factor)
        resized_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif resized_height * resized_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        resized_height = math.ceil(height * grow / factor) * factor
        resized_width = math.ceil(width * grow / factor) * factor
    return resized_height, resized_width


def picture_grid(
    height: int, width: int, *, merge_size: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Patches along height and width of one picture after resizing.

    >>> picture_grid(1080, 1920, merge_size=1, min_pixels=3136, max_pixels=3211264)
    (77, 137)
    """
    factor = PATCH_SIZE * merge_size
    resized = smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)
    return resized[0] // PATCH_SIZE, resized[1] // PATCH_SIZE


def token_budget_pixels(*, max_visual_tokens: int, num_pictures: int, merge_size: int) -> int:
    """Pixels each picture of a sample may have, when its token budget is shared equally among its pictures.

    A picture is an image or one frame of a clip. The original code's rule: ``max_tokens * factor**2 /
    num_images`` (image_processing: simple_batched_resize).

    >>> token_budget_pixels(max_visual_tokens=10240, num_pictures=180, merge_size=2)
    44600
    """
    return max_visual_tokens * (PATCH_SIZE * merge_size) ** 2 // num_pictures


def frame_indices(
    num_frames: int, source_fps: float, *, fps: float, min_frames: int, max_frames: int
) -> list[int]:
    """Which frames of a clip of ``num_frames`` are taken, by transformers' rule.

    ``VideoLlama3VideoProcessor.sample_frames`` in integers. transformers steps in float32: from 65 536 frames
    on it may take the neighbour of a frame, and for some lengths it adds a frame behind the last, which it then
    fails to read. ``max_frames`` wins over ``min_frames``; a clip with fewer frames gives all of them.

    >>> frame_indices(75, 25.0, fps=1.0, min_frames=1, max_frames=180)
    [0, 25, 50]
    """
    if num_frames <= 0:
        raise ValueError("a clip without frames")
    wanted = math.floor(min(max(num_frames / source_fps * fps, min_frames), max_frames, num_frames))
    wanted = max(wanted, 1)
    return [number * num_frames // wanted for number in range(wanted)]


def time_text(seconds: float) -> str:
    """The text before a frame's visual tokens.

    >>> time_text(1.25)
    'Time 1.2s:'
    """
    return f"Time {seconds:.1f}s:"
