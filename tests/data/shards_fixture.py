"""Small real shards: pictures, H.264 clips and text, written by write_shards as a user would."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np

from tests.data.conftest import drawn_picture, picture_bytes, still_and_moving
from vl3train.config.choices import Device
from vl3train.config.schema import (
    DataConfig,
    MachineConfig,
    ModelConfig,
    RunConfig,
    StageConfig,
    StepConfig,
    TrainConfig,
)
from vl3train.data.prepare.annotated_records import AnnotatedRecords
from vl3train.data.prepare.write_shards import write_shards


def write_clip(path: Path, frames: list[np.ndarray], rate: int = 5) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for array in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())


def turns(question: str, reply: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]


def make_source(folder: Path, *, images: int, clips: int, texts: int, seed: int, per_shard: int = 6) -> Path:
    """``folder/shards``, of so many samples of each kind, in mixed order."""
    rng = np.random.default_rng(seed)
    media = folder / "media"
    media.mkdir(parents=True)
    records = []
    for i in range(images):
        height, width = (int(side) for side in rng.integers(60, 200, 2))
        (media / f"{i}.png").write_bytes(picture_bytes(drawn_picture(height, width, i)))
        records.append({"image": f"{i}.png", "conversations": turns("<image>\nHow many?", f"There are {i}.")})
    for i in range(clips):
        write_clip(media / f"{i}.mp4", still_and_moving(int(rng.integers(6, 20)), 64, 96))
        records.append(
            {"video": f"{i}.mp4", "conversations": turns("<video>\nDescribe.", f"A square moves {i}.")}
        )
    for i in range(texts):
        words = "The quick brown fox " * int(rng.integers(1, 9))
        records.append({"conversations": turns(f"{i}: {words}?", "It jumps " * int(rng.integers(1, 9)))})
    mixed = [records[i] for i in rng.permutation(len(records))]
    file = folder / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in mixed))
    write_shards(
        AnnotatedRecords((str(file),), (media,)),
        folder / "shards",
        max_samples=per_shard,
        max_bytes=10**9,
        skip_rejected=False,
        progress=lambda what, count: None,
    )
    return folder / "shards"


def make_recipe(root: Path, *, held_out: bool = True) -> Path:
    """A recipe of three sources, one of them with held-out samples, all below ``root``."""
    make_source(root / "pictures", images=9, clips=0, texts=0, seed=1)
    make_source(root / "clips", images=0, clips=5, texts=3, seed=2)
    make_source(root / "words", images=0, clips=0, texts=20, seed=3)
    make_source(root / "test", images=2, clips=1, texts=4, seed=4)
    path = root / "recipe.yaml"
    path.write_text(
        "name: small\nabout: tests\nsources:\n"
        "  - {name: pictures, shards: pictures/shards}\n"
        "  - {name: clips, shards: clips/shards"
        + (", held_out: test/shards}\n" if held_out else "}\n")
        + "  - {name: words, shards: words/shards}\n"
    )
    return path


def train_config(root: Path, recipe: Path, **step: object) -> TrainConfig:
    """A config of small packs over that recipe."""
    sizes = {"max_tokens": 400, "max_patches": 1200, "global_packs": 4, "max_samples": 12}
    return TrainConfig(
        stage=StageConfig(
            number=3, name="test", recipe=str(recipe), learning_rates={"projector": 1e-3}, prune_frames=True
        ),
        model=ModelConfig(name="debug"),
        data=DataConfig(root=str(root), fps=2.0, num_workers=0),
        step=StepConfig(**(sizes | step)),  # type: ignore[arg-type]
        machine=MachineConfig(device=Device.cpu, loss_chunk_tokens=32),
        run=RunConfig(output_dir=str(root / "run")),
    )
