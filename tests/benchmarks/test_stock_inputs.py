"""What transformers is given to compare with: its own processor's tensors, in the sizes of training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from benchmarks.stock_inputs import StockInputs
from tests.inference.asked import draw_media
from vl3train.contracts.tokens import VIDEO_PAD
from vl3train.data.media.clips import DecodeLimits, decode_clip
from vl3train.inference.requests import Request


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return draw_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def stock(lively_model_dir):
    return StockInputs(processor=AutoProcessor.from_pretrained(lively_model_dir))


def test_inputs_equal_the_processors(stock, media):
    """One image and one clip: no budget is shared, so the stock processor makes the same tensors."""
    request = Request(prompt="How many?", images=(media / "a.jpg",), videos=(media / "long.mp4",))
    ours = stock.inputs(request)
    data = (media / "long.mp4").read_bytes()
    limits = DecodeLimits(max_pixels=10**8, max_seconds=1e4)
    clip = decode_clip(data, fps=1.0, min_frames=1, max_frames=180, limits=limits)
    assert len(clip.times) == 5
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "How many?"}]
    text = stock.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    theirs = stock.processor(
        text=[text],
        images=[Image.open(media / "a.jpg")],
        videos=[torch.from_numpy(clip.frames).permute(0, 3, 1, 2)],
        videos_kwargs={
            "do_sample_frames": False,
            "video_metadata": [
                {
                    "fps": 8.0,
                    "total_num_frames": 40,
                    "frames_indices": [round(8 * time) for time in clip.times],
                }
            ],
        },
        return_tensors="pt",
    )
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    assert "pixel_values_videos" in ours


def test_time_stamps_are_the_clips_own(stock, media):
    stock = replace(stock, fps=2.0, max_frames=6)
    ids = stock.inputs(Request(prompt="x", videos=(media / "long.mp4",)))["input_ids"][0]
    text = stock.processor.tokenizer.decode(ids).replace(VIDEO_PAD, "")
    clip = decode_clip(
        (media / "long.mp4").read_bytes(),
        fps=2.0,
        min_frames=1,
        max_frames=6,
        limits=DecodeLimits(max_pixels=10**8, max_seconds=1e4),
    )
    assert len(clip.times) == 6
    stamps = ",".join(f"Time {time:.1f}s:" for time in clip.times)
    assert text == f"<|im_start|>user\n{stamps}\nx<|im_end|>\n<|im_start|>assistant\n"


def test_the_token_budget_is_shared_among_all_pictures(lively_model_dir, media):
    processor = AutoProcessor.from_pretrained(lively_model_dir)
    processor.image_processor.max_visual_tokens = 40
    small = StockInputs(processor=processor)
    request = Request(prompt="x", images=(media / "a.jpg", media / "b.png"), videos=(media / "short.mp4",))
    inputs = small.inputs(request)
    for grid in inputs["image_grid_thw"]:
        assert 5 <= grid.prod() <= 10  # 40 tokens for 2 images and 2 frames
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(processor.image_token_id) == int(inputs["image_grid_thw"].prod(1).sum())
    assert ids.count(processor.video_token_id) == int(inputs["video_compression_mask"].sum())
    alone = small.inputs(Request(prompt="x", images=(media / "a.jpg",)))
    assert alone["image_grid_thw"].prod() == 24  # 4 x 6 patches; 40 would fit
