"""The synthetic mixture that the planner is measured on: 35 % text, 50 % images, 15 % clips.

Text is lognormal with median 400 tokens, cut to 50 to 2000. Images have 200 to 4000 visual tokens at merge size 2
(log-uniform), clips 2500 to 16 000 before pruning, cut at the paper's 10 240, of which Beta(4, 2) are kept, in 8
to 180 frames. Both carry a question and an answer of about 120 tokens. No sample is longer than 16 384.
"""

from __future__ import annotations

import numpy as np

from vl3train.data.plan.sample_table import SampleTable

MAX_TOKENS, MAX_VISUAL_TOKENS = 16_384, 10_240


def mixture(num_samples: int, seed: int = 0) -> SampleTable:
    """The lengths of so many samples, in three sources: text, images, clips."""
    rng = np.random.default_rng(seed)
    num_text, num_images = int(0.35 * num_samples), int(0.5 * num_samples)
    num_clips = num_samples - num_text - num_images
    words = np.clip(rng.lognormal(np.log(400), 0.9, num_text), 50, 2000).astype(np.int32)
    image = _log_uniform(rng, 200, 4000, num_images)
    clip = np.minimum(_log_uniform(rng, 2500, 16_000, num_clips), MAX_VISUAL_TOKENS)
    frames = np.minimum(_log_uniform(rng, 8, 180, num_clips), clip // 16)
    frame_patches = 4 * clip // frames
    kept = (clip * rng.beta(4, 2, num_clips)).astype(np.int32)
    beside = np.clip(rng.lognormal(np.log(120), 0.8, num_images + num_clips), 10, 1500).astype(np.int32)
    visual_tokens = np.concatenate([image, kept]) + beside
    tokens = np.minimum(np.concatenate([words, visual_tokens]), MAX_TOKENS).astype(np.int32)
    patches = np.concatenate([np.zeros(num_text, np.int32), 4 * image, frame_patches * frames]).astype(
        np.int32
    )
    pairs = np.zeros(num_samples, np.int64)
    pairs[num_text : num_text + num_images] = (4 * image.astype(np.int64)) ** 2
    pairs[num_text + num_images :] = frames * frame_patches.astype(np.int64) ** 2
    supervised = np.concatenate([words // 2, beside // 2])
    return SampleTable(
        sizes=(num_text, num_images, num_clips),
        weights=(1.0, 1.0, 1.0),
        num_tokens=tokens,
        num_supervised_tokens=supervised,
        num_patches=patches,
        num_patch_pairs=pairs,
        num_items=(patches > 0).astype(np.int32),
        fingerprint=f"mixture-{num_samples}-{seed}",
    )


def _log_uniform(rng: np.random.Generator, low: int, high: int, count: int) -> np.ndarray:
    return np.exp(rng.uniform(np.log(low), np.log(high), count)).astype(np.int32)
