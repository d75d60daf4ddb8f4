"""A model that trains in one process and some seconds, for tests: packs of rendered samples, plain AdamW."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.curves.task import rendered
from benchmarks.data.packs import pack_batch
from benchmarks.lessons.write import write_data
from vl3train.contracts.records import Batch, RenderedSample
from vl3train.contracts.tokens import IGNORE_INDEX
from vl3train.data.render.chat_tokens import ChatTokenizer
from vl3train.model.packed_forward import PackedModel
from vl3train.model.weights.from_parts import init_from_parts
from vl3train.model.weights.processor import build_processor


def prepared(
    folder: Path, parts: Path, counts: dict[str, int], tasks: Sequence[str], change: str = ""
) -> dict[str, list[RenderedSample]]:
    """Write and render samples of some tasks, by split; ``parts`` has the language model and its tokenizer."""
    write_data(folder, counts, 0, change, tasks)
    build_processor(parts / "language_model").save_pretrained(folder / "processor")
    tokenizer = ChatTokenizer.from_folder(folder / "processor")
    end = f"-{change}" if change else ""
    return {
        split: [one for task in tasks for one in rendered(folder / f"{task}-{split}{end}", tokenizer)]
        for split in counts
    }


def new_model(parts: Path) -> PackedModel:
    """The true architecture from the parts, in float32 on this CPU."""
    processor = build_processor(parts / "language_model")
    hf_model = init_from_parts(
        str(parts / "vision_encoder-0"),
        str(parts / "language_model"),
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        initializer_range=0.09,
        seed=0,
        dtype=torch.float32,
    )
    return PackedModel(hf_model, "reference")


def train(
    model: PackedModel,
    samples: Sequence[RenderedSample],
    *,
    steps: int,
    samples_a_step: int,
    rate: float = 2e-3,
    spoilt: Callable[[Batch], Batch] = lambda batch: batch,
) -> list[float]:
    """Losses of the steps, all parts at one rate; ``spoilt`` may change each batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    rng, losses = random.Random(0), []
    model.train()
    for step in range(steps):
        chosen = rng.sample(list(samples), samples_a_step)
        supervised = sum(int((sample.labels != IGNORE_INDEX).sum()) for sample in chosen)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10) * min(1.0, 2 * (1 - step / steps))
        optimizer.zero_grad()
        loss = model(spoilt(pack_batch(chosen))).loss_sum / supervised
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def held_out(model: PackedModel, samples: Sequence[RenderedSample]) -> tuple[float, float]:
    """Loss a token, and the share of samples with every token of the answer right, of one pack of samples."""
    model.eval()
    batch = pack_batch(list(samples))
    output = model(batch)
    wrong = set(batch.supervised_segments[~output.correct.bool()].tolist())
    return float(output.loss_sum) / len(output.token_losses), 1 - len(wrong) / len(samples)
