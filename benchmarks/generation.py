"""The rows of benchmarks/generate.py: what is asked, and how both sides answer."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.data.drawn_media import encode_jpeg, noise
from benchmarks.data.drawn_shards import WORDS, write_tokenizer
from benchmarks.figures import Figures
from benchmarks.gpu.model import build_model
from benchmarks.stock_inputs import StockInputs, pad_left
from vl3train.cli.evaluate import checked
from vl3train.config.schema import TrainConfig
from vl3train.data.pipeline import evaluation_batches, open_data
from vl3train.data.prepare.annotated_records import AnnotatedRecords
from vl3train.data.prepare.write_shards import write_shards
from vl3train.demo.parts import PartSizes
from vl3train.inference.requests import Request
from vl3train.model.attention.backends import choose_attention
from vl3train.model.attention.qkv_op import SERVED
from vl3train.model.generation.generate import Generator
from vl3train.model.packed_forward import PackedModel, head_dims
from vl3train.model.weights.processor import build_processor


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison."""

    figure: str
    kind: str  # image or video
    size: str  # of the model
    num_questions: int
    num_media: int  # different pictures or clips, with as many questions each
    side: int  # pixels of a picture or frame
    num_frames: int
    answer_tokens: int
    first_batch: int  # of transformers
    aim: float | None


WORK = {
    "images": Row(
        figure="generate_ratio_images",
        kind="image", size="2b", num_questions=512, num_media=64, side=560, num_frames=1, answer_tokens=32,
        first_batch=32, aim=4,
    ),
    "images_apart": Row(
        figure="generate_ratio_images_apart",
        kind="image", size="2b", num_questions=512, num_media=512, side=560, num_frames=1, answer_tokens=32,
        first_batch=64, aim=None,
    ),
    "clips": Row(
        figure="generate_ratio_clips",
        kind="video", size="2b", num_questions=64, num_media=8, side=224, num_frames=180, answer_tokens=32,
        first_batch=16, aim=3,
    ),
    "cpu_apart": Row(
        figure="generate_ratio_cpu_apart",
        kind="image", size="debug", num_questions=256, num_media=256, side=140, num_frames=1, answer_tokens=32,
        first_batch=8, aim=None,
    ),
    "cpu": Row(
        figure="generate_ratio_cpu",
        kind="image", size="debug", num_questions=256, num_media=32, side=140, num_frames=1, answer_tokens=32,
        first_batch=8, aim=3,
    ),
}  # fmt: skip


def draw(folder: Path, row: Row) -> list[Request]:
    """The media as files and as shards below ``folder``; the questions about the files."""
    media = folder / "media"
    media.mkdir()
    drawn = min(row.num_media, row.num_questions)
    suffix = ".jpg" if row.kind == "image" else ".mp4"
    for number in range(drawn):
        path = media / f"{number}{suffix}"
        if row.kind == "image":
            path.write_bytes(encode_jpeg(noise(row.side, row.side, number)))
        else:
            write_clip(path, row, number)
    rng = np.random.default_rng(0)
    records, requests = [], []
    for number in range(row.num_questions):
        name, prompt = f"{number % drawn}{suffix}", " ".join(rng.choice(WORDS, 20))
        turns = [{"from": "human", "value": f"<{row.kind}>\n{prompt}"}, {"from": "gpt", "value": WORDS[0]}]
        records.append({row.kind: name, "conversations": turns})
        files = {"images": (media / name,)} if row.kind == "image" else {"videos": (media / name,)}
        requests.append(Request(prompt=prompt, **files))
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    write_shards(
        AnnotatedRecords((str(folder / "records.jsonl"),), (media,)),
        folder / "shards",
        max_samples=32,
        max_bytes=10**9,
        skip_rejected=False,
        progress=lambda what, count: None,
    )
    (folder / "recipe.yaml").write_text(
        "name: drawn\nabout: Drawn.\nsources:\n  - {name: drawn, held_out: shards}\n"
    )
    return requests


def write_clip(path: Path, row: Row, seed: int) -> None:
    """``num_frames`` seconds at ten frames a second: a picture that drifts."""
    scene = noise(row.side, 2 * row.side, seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=10)
        stream.height, stream.width, stream.pix_fmt = row.side, row.side, "yuv420p"
        for number in range(10 * row.num_frames):
            left = number % row.side
            frame = np.ascontiguousarray(scene[:, left : left + row.side])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def make_model(row: Row, folder: Path, device: torch.device) -> tuple[Any, Any]:
    """Model and processor; the tokenizer lies in ``folder``."""
    write_tokenizer(folder)
    processor = build_processor(folder)
    if row.size == "debug":
        from transformers import VideoLlama3Config, VideoLlama3ForConditionalGeneration

        sizes = PartSizes()
        config = VideoLlama3Config(**debug_config(sizes, len(processor.tokenizer)))
        torch.manual_seed(0)
        model: Any = VideoLlama3ForConditionalGeneration(config)
    else:
        model = build_model(row.size, device)
    model.config.image_token_id = processor.image_token_id
    model.config.video_token_id = processor.video_token_id
    model.generation_config.eos_token_id = None
    model.generation_config.use_cache = True
    return model.to(device).eval(), processor


def debug_config(sizes: PartSizes, vocabulary: int) -> dict[str, Any]:
    """The debug model's shapes."""
    text = {
        "model_type": "qwen2",
        "vocab_size": vocabulary,
        "hidden_size": sizes.text_hidden,
        "intermediate_size": 4 * sizes.text_hidden,
        "num_hidden_layers": sizes.text_layers,
        "num_attention_heads": sizes.text_hidden // sizes.head_dim,
        "num_key_value_heads": max(1, sizes.text_hidden // sizes.head_dim // 2),
        "tie_word_embeddings": True,
    }
    vision = {
        "hidden_size": sizes.vision_hidden,
        "intermediate_size": 4 * sizes.vision_hidden,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": 4,
        "patch_size": 14,
    }
    return {"text_config": text, "vision_config": vision, "tie_word_embeddings": True}


class Prepared(Dataset[dict[str, Any]]):
    """transformers' inputs of each question; frames are decoded by vl3train's decoder, which is the faster one."""

    def __init__(self, stock: StockInputs, requests: list[Request]) -> None:
        self.stock, self.requests = stock, requests

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.stock.inputs(self.requests[number])


def stock_answers(
    model: Any, processor: Any, requests: list[Request], row: Row, batch_size: int, cache: str, workers: int
) -> list[list[int]]:
    """Ids of each answer, by transformers' generate over batches; ``cache`` is dynamic or static."""
    loader = DataLoader(
        Prepared(StockInputs(processor=processor), requests),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=lambda many: pad_left(many, processor.tokenizer.pad_token_id),
        multiprocessing_context="fork" if workers else None,
    )
    found: list[list[int]] = []
    for inputs in loader:
        placed = {
            name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
            for name, value in inputs.items()
        }
        with torch.inference_mode():
            ids = model.generate(
                **placed, max_new_tokens=row.answer_tokens, do_sample=False, cache_implementation=cache
            )
        found += ids[:, inputs["input_ids"].shape[1] :].tolist()
    return found


def stock_runs(
    model: Any, processor: Any, requests: list[Request], row: Row, cache: str, workers: int, batch_size: int
) -> Iterator[tuple[list[list[int]], float, int]]:
    """Answers, seconds and batch size, for batch sizes that double while that helps and memory is there."""
    before = float("inf")
    while batch_size <= len(requests):
        try:
            # Untimed: with a static cache transformers compiles a step for each batch size on a GPU.
            stock_answers(model, processor, requests[:batch_size], row, batch_size, cache, workers)
            started = time.perf_counter()
            found = stock_answers(model, processor, requests, row, batch_size, cache, workers)
            seconds = wait(model.device) - started
        except torch.OutOfMemoryError:
            return
        yield found, seconds, batch_size
        if seconds > 0.97 * before:
            return
        before, batch_size = seconds, 2 * batch_size


def packed_answers(
    packed: PackedModel, data: Any, cfg: TrainConfig, row: Row, most: int
) -> tuple[dict[str, list[int]], float]:
    """Ids of the answers to the first ``most`` questions or a few more, by key; seconds of waiting for packs."""
    generator = Generator(packed, (), max_new_tokens=row.answer_tokens)
    waited = 0.0

    def first() -> Iterator[Any]:
        nonlocal waited
        given = 0
        packs = evaluation_batches(data, cfg, rank=0, dp_size=1, share_prefix=packed.attention in SERVED)
        while given < most:
            started = time.perf_counter()
            batch = next(packs, None)
            waited += time.perf_counter() - started
            if batch is None:
                return
            given += len(batch.sample_keys)
            yield batch

    return {answer.key: answer.ids for answer in generator.answers(first())}, waited


def compare(name: str, row: Row, workers: int, figures: Figures) -> None:
    """Run both sides of a row, add its figures."""
    device = torch.device("cuda" if row.size != "debug" else "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        requests = draw(folder, row)
        model, processor = make_model(row, folder / "tokenizer", device)
        words = ["stage=4", "model=2b", "stage.image_merge_size=1", f"data.num_workers={workers}"]
        words += [f"data.recipe={folder / 'recipe.yaml'}", f"data.root={folder}"]
        words += ["machine=cpu" if device.type == "cpu" else "machine=one_gpu"]
        words += [f"data.plan_cache={folder / 'plans'}", f"run.output_dir={folder / 'run'}"]
        cfg = checked(words, None)
        data = open_data(cfg, tokenizer_dir=folder / "tokenizer", held_out=True, build=True)
        attention = choose_attention("auto", device, head_dims(model), model.dtype).name
        packed = PackedModel(model, attention).eval()
        packed_answers(packed, data, cfg, row, 8)
        started = time.perf_counter()
        ours, waited = packed_answers(packed, data, cfg, row, len(requests))
        our_seconds = wait(device) - started
        if len(ours) != len(requests):
            raise RuntimeError(f"{len(ours)} answers to {len(requests)} questions")
        print(f"{name}: vl3train: {our_seconds:.1f} s, {waited:.1f} s of them waiting for packs", flush=True)
        best, best_way, theirs, best_size = float("inf"), "", [], row.first_batch
        for cache in ("dynamic", "static") if device.type == "cuda" else ("dynamic",):
            # A static cache from the best size of a dynamic one on: each size compiles a decoding step.
            for found, seconds, batch_size in stock_runs(
                model, processor, requests, row, cache, workers, best_size
            ):
                print(
                    f"{name}: transformers, {cache} cache, batches of {batch_size}: {seconds:.1f} s",
                    flush=True,
                )
                if seconds < best:
                    best, best_size, theirs = seconds, batch_size, found
                    best_way = f"in batches of {batch_size}, {cache} cache"
        in_order = [ours[key] for key in sorted(ours)]  # keys number the records
        same = sum(one == other for one, other in zip(in_order, theirs, strict=True))
        if model.dtype == torch.float32 and same != len(requests):
            raise RuntimeError(f"only {same} of {len(requests)} answers are the same in float32")
    note = (
        f"{len(requests)} questions, {row.answer_tokens} tokens each: vl3train {our_seconds:.2f} s, "
        f"{waited:.2f} s of them waiting for packs, transformers "
        f"{best:.2f} s {best_way}; {same} answers the same; {workers} loader workers"
    )
    figures.add(row.figure, best / our_seconds, "x", "higher", note, row.aim)
    rate = "evaluate_questions_per_second" + ("" if name == "images" else f"_{name}")
    figures.add(rate, len(requests) / our_seconds, "questions/s", "higher", note)


def wait(device: torch.device) -> float:
    """The time when the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
