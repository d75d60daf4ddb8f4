"""The small real task of benchmarks/loss_curves.py: the demo's pictures, clips and texts, and its debug model."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vl3train.contracts.records import RenderedSample, RenderSettings
from vl3train.data.media.clips import DecodeLimits
from vl3train.data.render.chat_tokens import ChatTokenizer
from vl3train.data.render.samples import render_sample
from vl3train.data.shards.manifest import shard_files
from vl3train.data.shards.read import read_parts
from vl3train.data.shards.tar_headers import CONVERSATION_PART, shard_samples
from vl3train.demo.build import write_folder
from vl3train.demo.parts import PartSizes, make_debug_parts
from vl3train.demo.questions import TASKS
from vl3train.model.weights.from_parts import init_from_parts
from vl3train.model.weights.processor import build_processor

SOURCES = ("colour", "shape", "position", "count", "motion", "text")


@dataclass(frozen=True, kw_only=True)
class Task:
    """Samples to train on, and where the model's parts lie."""

    samples: list[RenderedSample]
    parts: Path
    image_token_id: int
    video_token_id: int

    def model(self, dtype: torch.dtype, device: torch.device) -> Any:
        """The same model each time: the debug language model, encoder and projector of random weights."""
        hf_model: Any = init_from_parts(
            str(self.parts / "vision_encoder"),
            str(self.parts / "language_model"),
            image_token_id=self.image_token_id,
            video_token_id=self.video_token_id,
            initializer_range=0.09,  # configs/model/debug.yaml
            seed=0,
            dtype=dtype,
        )
        return hf_model.to(device)

    def steps(self, num_steps: int, samples_a_step: int, seed: int) -> list[list[RenderedSample]]:
        """The samples of each step, drawn without repetition within an epoch; ``seed`` decides the order only."""
        rng = np.random.default_rng(seed)
        order: list[int] = []
        while len(order) < num_steps * samples_a_step:
            order += rng.permutation(len(self.samples)).tolist()
        chosen = [order[i * samples_a_step : (i + 1) * samples_a_step] for i in range(num_steps)]
        return [[self.samples[i] for i in numbers] for numbers in chosen]


def make_task(folder: Path, *, scale: float, part_steps: int) -> Task:
    """Draw the demo's sources (``scale`` of their samples) and make the debug model's parts, below ``folder``."""
    rng = random.Random(0)
    for source in SOURCES:
        write_folder(folder, source, 0, scale)
    questions = [TASKS[source](rng) for source in SOURCES for _ in range(200)]
    make_debug_parts(folder / "parts", questions, 0, PartSizes(steps=part_steps), lambda *_: None)
    tokenizer_dir = folder / "processor"
    processor = build_processor(folder / "parts" / "language_model")
    processor.save_pretrained(tokenizer_dir)
    tokenizer = ChatTokenizer.from_folder(tokenizer_dir)
    return Task(
        samples=[sample for source in SOURCES for sample in rendered(folder / source, tokenizer)],
        parts=folder / "parts",
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
    )


def rendered(shards: Path, tokenizer: ChatTokenizer) -> list[RenderedSample]:
    """Every sample of a folder of shards, as training renders it."""
    settings = RenderSettings(
        image_merge_size=1,
        video_merge_size=2,
        prune_frames=True,
        fps=1.0,
        min_frames=1,
        max_frames=16,
        image_min_pixels=3136,
        image_max_pixels=50176,
        video_min_pixels=3136,
        video_max_pixels=200704,
        max_visual_tokens=256,
        tokenizer=tokenizer.fingerprint,
    )
    limits = DecodeLimits(max_pixels=10_000_000, max_seconds=60)
    found = []
    for shard in shard_files(shards):
        for sample in shard_samples(shard):
            parts = read_parts(shard, sample.parts)
            found.append(
                render_sample(
                    parts.pop(CONVERSATION_PART),
                    parts,
                    settings,
                    tokenizer,
                    limits,
                    key=f"{shards.name}/{sample.key}",
                    planned=None,
                )
            )
    return found
