"""Shards of drawn JPEGs in the mix of benchmarks/data/packs.py, for timing the whole training loop.

The same sizes as packs.py's samples; clips are stored frames (vl3train/data/media/stored_frames.py). Pictures are
smooth with some grain, so that decoding them costs about what photos cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import simplejpeg
import yaml

from benchmarks.data.packs import Mix, draw_sample
from vl3train.contracts.records import RenderedSample
from vl3train.contracts.tokens import IGNORE_INDEX, PATCH_SIZE
from vl3train.data.media.stored_frames import pack_frames
from vl3train.data.prepare.write_shards import write_members
from vl3train.data.records.conversation import Content, Conversation, Image, Text, Turn, Video
from vl3train.data.video.timeline import FrameRule
from vl3train.demo.tokenizer import train_tokenizer

WORDS = tuple(first + second for first in "bdfghklmnprstvz" for second in "aeiou")
"""Each, with the space before it, is one token of ``write_tokenizer``'s."""
SAMPLES_A_SHARD = 40
RULE = FrameRule(fps=1.0, min_frames=1, max_frames=180)
"""How frames were sampled: vl3train's defaults, or the index would reject the stored frames."""


def write_tokenizer(folder: Path) -> None:
    """A tokenizer to which ``WORDS`` are single tokens."""
    train_tokenizer([f" {' '.join(WORDS)}"] * 20, folder, vocab_size=512)


def write_recipe(
    folder: Path, num_samples: int, mix: Mix, *, image_merge_size: int, max_tokens: int, processes: int
) -> Path:
    """Write shards of ``num_samples`` below ``folder``; the recipe that names them."""
    shards = folder / "shards"
    shards.mkdir(parents=True)
    jobs = [
        (shards / f"shard-{number:06d}.tar", number, mix, image_merge_size, max_tokens)
        for number in range(-(-num_samples // SAMPLES_A_SHARD))
    ]
    if processes == 1:
        list(map(write_shard, jobs))
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            list(pool.map(write_shard, jobs))
    recipe = folder / "recipe.yaml"
    source = {"name": "drawn", "shards": str(shards)}
    recipe.write_text(yaml.safe_dump({"name": "drawn", "about": "Drawn pictures.", "sources": [source]}))
    return recipe


def write_shard(job: tuple[Path, int, Mix, int, int]) -> None:
    """One shard; its number is the seed of its samples."""
    path, number, mix, image_merge_size, max_tokens = job
    rng = np.random.default_rng(number)

    def members() -> Iterator[tuple[str, dict[str, bytes]]]:
        for position in range(SAMPLES_A_SHARD):
            sample = draw_sample(rng, image_merge_size=image_merge_size, max_tokens=max_tokens, mix=mix)
            yield f"{number:06d}-{position:04d}", sample_members(sample, rng)

    write_members(path, members())


def sample_members(sample: RenderedSample, rng: np.random.Generator) -> dict[str, bytes]:
    """A sample with as many words, answered words, pictures and pixels as the drawn one."""
    num_answer = int((sample.labels != IGNORE_INDEX).sum())
    num_asked = max(1, len(sample.input_ids) - len(sample.placeholder_positions) - num_answer)
    asked: list[Content] = [Text(words(num_asked, rng))]
    media: dict[str, bytes] = {}
    if len(sample.grids):
        frames, height, width = sample.grids[0].tolist()
        shown = [picture(height * PATCH_SIZE, width * PATCH_SIZE, rng) for _ in range(frames)]
        if frames == 1:
            asked.insert(0, Image("0.jpg"))
            media["0.jpg"] = simplejpeg.encode_jpeg(shown[0], quality=90, colorsubsampling="420")
        else:
            asked.insert(0, Video("0.frames"))
            media["0.frames"] = pack_frames(shown, [float(second) for second in range(frames)], RULE)
    turns = (Turn("user", tuple(asked)), Turn("assistant", (Text(words(num_answer, rng)),)))
    return {"json": Conversation(turns).to_json(), **media}


def words(count: int, rng: np.random.Generator) -> str:
    """``count`` words."""
    return " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), count))


def picture(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """(height, width, 3) uint8: waves and grain."""
    y, x = np.ogrid[:height, :width]
    channels = []
    for _ in range(3):
        along, across, phase = rng.uniform(0.005, 0.05, 3)
        channels.append(np.sin(y * along + phase * 100) + np.cos(x * across))
    waves = np.stack(channels, -1) * 55 + 128
    grain = rng.integers(-12, 13, (height, width, 1))
    return np.ascontiguousarray(np.clip(waves + grain, 0, 255).astype(np.uint8))
