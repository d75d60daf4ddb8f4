"""Answers of a trained model: media and a question in, text out, with transformers' own ``generate``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl3train.config.data_options import DataConfig
from vl3train.contracts.geometry import time_text, token_budget_pixels
from vl3train.contracts.records import SampleError
from vl3train.contracts.tokens import IMAGE_PAD, VIDEO_PAD
from vl3train.inference.requests import Request, as_line


@dataclass(frozen=True, kw_only=True)
class Asker:
    """A model with its processor, and how frames and tokens are sampled."""

    model: Any
    processor: Any
    fps: float
    min_frames: int
    max_frames: int
    max_new_tokens: int
    temperature: float
    frame_sampling: str

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: str | None = None,
        fps: float | None = None,
        max_frames: int | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        frame_sampling: str = "transformers",
    ) -> Asker:
        """Load a run, a checkpoint or an export.

        Args:
            folder: what ``model.weights.hf_folder.locate_trained`` takes.
            device: None takes cuda where there is a GPU, else the CPU.
            fps: frames sampled from each second of a clip; None takes the value of the training.
            max_frames: most frames of a clip; None takes the value of the training.
            max_new_tokens: most tokens of an answer.
            temperature: 0 is greedy.
            frame_sampling: "transformers" or "original"; a processor does not say which one the training had.

        Raises:
            OSError, ValueError: ``folder`` holds no such model.
        """
        import torch
        from transformers.utils import logging

        from vl3train.model.weights.hf_folder import load_trained
        from vl3train.model.weights.processor import trained_fps

        logging.disable_progress_bar()
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        # A CPU computes bfloat16 slowly; the cast up is exact.
        model, processor = load_trained(folder, dtype=torch.float32 if place.type == "cpu" else None)
        trained = processor.video_processor
        return cls(
            model=model.to(place),
            processor=processor,
            fps=fps if fps is not None else trained_fps(processor),
            min_frames=trained.min_frames,
            max_frames=max_frames if max_frames is not None else trained.max_frames,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            frame_sampling=frame_sampling,
        )

    def problems(self, request: Request) -> list[str]:
        """Pictures and clips of the request that cannot be decoded, with the reason."""
        found = []
        for path in (*request.images, *request.videos):
            try:
                self._picture(path) if path in request.images else self._clip(path)
            except SampleError as error:
                found.append(f"{path}: {error}")
        return found

    def answers(self, requests: Sequence[Request]) -> list[str]:
        """One answer to each request, generated as one batch.

        Raises:
            SampleError: a picture or clip cannot be read; ``problems`` finds them before.
        """
        import torch

        inputs = pad_left(
            [self.inputs(request) for request in requests], self.processor.tokenizer.pad_token_id
        )
        placed = {
            name: value.to(self.model.device, self.model.dtype if value.is_floating_point() else value.dtype)
            for name, value in inputs.items()
        }
        sampling: dict[str, Any] = {"do_sample": self.temperature > 0}
        if self.temperature > 0:
            sampling["temperature"] = self.temperature
        with torch.inference_mode():
            ids = self.model.generate(**placed, max_new_tokens=self.max_new_tokens, **sampling)
        new_ids = ids[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.tokenizer.batch_decode(new_ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def inputs(self, request: Request) -> dict[str, Any]:
        """The tensors of one request, with the same frames, time stamps and sizes as in training.

        The processor is called once for each item: one call for several gives them one size, while in training all
        images and frames of a sample share the token budget equally.
        """
        import torch
        from PIL import Image

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
        from vl3train.data.pictures.images import decode_image

        return decode_image(path.read_bytes(), self._limits())

    def _clip(self, path: Path) -> Any:
        from vl3train.data.media.clips import decode_clip

        return decode_clip(
            path.read_bytes(),
            fps=self.fps,
            min_frames=self.min_frames,
            max_frames=self.max_frames,
            limits=self._limits(),
            frame_sampling=self.frame_sampling,
        )

    def _limits(self) -> Any:
        from vl3train.data.media.clips import DecodeLimits

        data = DataConfig()
        return DecodeLimits(max_pixels=data.decode_max_pixels, max_seconds=data.decode_max_seconds)


def write_answers(asker: Asker, requests: Sequence[Request], file: Path, batch_size: int) -> Iterator[int]:
    """Answer the requests in order, ``batch_size`` together, and yield how many are answered so far.

    Each batch of answers is written as soon as it is there: a line of JSON with the request and its ``answer``.
    Raises FileExistsError when ``file`` exists.
    """
    with file.open("x", encoding="utf-8") as out:
        for first in range(0, len(requests), batch_size):
            together = requests[first : first + batch_size]
            for request, answer in zip(together, asker.answers(together), strict=True):
                out.write(json.dumps({**as_line(request), "answer": answer}, ensure_ascii=False) + "\n")
            out.flush()
            yield first + len(together)


def pad_left(inputs: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Several requests as one batch: token rows are padded on the left, pixels are concatenated."""
    import torch

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
