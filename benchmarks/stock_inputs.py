"""transformers' own inputs of a question, with vl3train's frames: what its ``generate`` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vl3train.config.data_options import DataConfig
from vl3train.contracts.geometry import time_text, token_budget_pixels
from vl3train.contracts.tokens import IMAGE_PAD, VIDEO_PAD
from vl3train.data.media.clips import DecodeLimits, decode_clip
from vl3train.data.pictures.images import decode_image
from vl3train.inference.requests import Request


@dataclass(frozen=True, kw_only=True)
class StockInputs:
    """A processor of transformers, and how frames are sampled."""

    processor: Any
    fps: float = 1.0
    min_frames: int = 1
    max_frames: int = 180

    def inputs(self, request: Request) -> dict[str, Any]:
        """The tensors of one request, with the same frames, time stamps and sizes as in training.

        The processor is called once for each item: one call for several gives them one size, while in training all
        images and frames of a sample share the token budget equally.
        """
        clips = [self._clip(path) for path in request.videos]
        num_pictures = len(request.images) + sum(len(clip.times) for clip in clips)
        image_processor, video_processor = self.processor.image_processor, self.processor.video_processor
        tensors: dict[str, list[Any]] = {}
        image_texts, video_texts = [], []
        for path in request.images:
            found = image_processor(
                images=[Image.fromarray(self._picture(path))],
                size=self._size(image_processor, num_pictures, num_frames=1),
                return_tensors="pt",
            )
            num_tokens = int(found["image_grid_thw"].prod()) // image_processor.merge_size**2
            image_texts.append(IMAGE_PAD * num_tokens)
            _collect(tensors, found)
        for clip in clips:
            found = video_processor(
                videos=[torch.from_numpy(clip.frames).permute(0, 3, 1, 2)],
                size=self._size(video_processor, num_pictures, num_frames=len(clip.times)),
                do_sample_frames=False,
                return_metadata=False,
                return_tensors="pt",
            )
            kept = found["video_compression_mask"].view(len(clip.times), -1).sum(1).tolist()
            frames = zip(clip.times, kept, strict=True)
            video_texts.append(",".join(time_text(time) + VIDEO_PAD * count for time, count in frames))
            _collect(tensors, found)

        content = [*({"type": "image"} for _ in request.images), *({"type": "video"} for _ in clips)]
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": [*content, {"type": "text", "text": request.prompt}]}
        ]
        if request.system is not None:
            messages.insert(0, {"role": "system", "content": request.system})
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        text = _put_in(_put_in(text, IMAGE_PAD, image_texts), VIDEO_PAD, video_texts)
        ids = self.processor.tokenizer(text, return_tensors="pt")["input_ids"]
        return {"input_ids": ids, **{name: torch.cat(values) for name, values in tensors.items()}}

    def _size(self, item_processor: Any, num_pictures: int, *, num_frames: int) -> dict[str, int]:
        """Pixel limits of one item, as the processor counts: ``longest_edge`` limits all its frames together."""
        shortest, longest = item_processor.size["shortest_edge"], item_processor.size["longest_edge"]
        # Only our processors have a budget that the items of a sample share.
        if max_visual_tokens := getattr(self.processor.image_processor, "max_visual_tokens", None):
            share = token_budget_pixels(
                max_visual_tokens=max_visual_tokens,
                num_pictures=num_pictures,
                merge_size=item_processor.merge_size,
            )
            longest = min(longest // num_frames, share) * num_frames
        return {"shortest_edge": shortest, "longest_edge": longest}

    def _picture(self, path: Path) -> Any:
        return decode_image(path.read_bytes(), self._limits())

    def _clip(self, path: Path) -> Any:
        return decode_clip(
            path.read_bytes(),
            fps=self.fps,
            min_frames=self.min_frames,
            max_frames=self.max_frames,
            limits=self._limits(),
            frame_sampling="transformers",
        )

    def _limits(self) -> DecodeLimits:
        data = DataConfig()
        return DecodeLimits(max_pixels=data.decode_max_pixels, max_seconds=data.decode_max_seconds)


def pad_left(inputs: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Several requests as one batch: token rows are padded on the left, pixels are concatenated."""
    longest = max(one["input_ids"].shape[1] for one in inputs)
    ids = torch.full((len(inputs), longest), pad_token_id)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(inputs):
        length = one["input_ids"].shape[1]
        ids[row, longest - length :] = one["input_ids"][0]
        mask[row, longest - length :] = 1
    names = dict.fromkeys(name for one in inputs for name in one if name != "input_ids")
    media = {name: torch.cat([one[name] for one in inputs if name in one]) for name in names}
    return {"input_ids": ids, "attention_mask": mask, **media}


def _collect(tensors: dict[str, list[Any]], found: Mapping[str, Any]) -> None:
    for name, value in found.items():
        tensors.setdefault(name, []).append(value)


def _put_in(text: str, placeholder: str, replacements: Sequence[str]) -> str:
    """``text`` with the n-th ``placeholder`` replaced by the n-th replacement."""
    pieces = text.split(placeholder)
    assert len(pieces) == len(replacements) + 1, "the chat template writes one placeholder for each item"
    return pieces[0] + "".join(new + piece for new, piece in zip(replacements, pieces[1:], strict=True))
