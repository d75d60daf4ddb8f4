"""Samples with random pixels and ids, as packed batches and as inputs of the stock model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from vl3train.contracts.records import Batch
from vl3train.contracts.tokens import IGNORE_INDEX, PATCH_VALUES

VOCAB, IMAGE, VIDEO = 120, 118, 119


@dataclass
class Item:
    """An image or a clip; ``keep`` says which merged tokens stay."""

    grid: tuple[int, int, int]
    merge: int
    keep: Tensor
    pixels: Tensor
    video: bool


@dataclass
class Conversation:
    """One sample: shifted labels, items in order of their placeholders."""

    ids: Tensor
    labels: Tensor
    items: list[Item]

    def stock_inputs(self) -> dict[str, Any]:
        """What VideoLlama3ForConditionalGeneration.forward takes; it shifts the labels itself."""
        inputs: dict[str, Any] = {
            "input_ids": self.ids[None],
            "labels": torch.cat([torch.tensor([IGNORE_INDEX]), self.labels[:-1]])[None],
            "use_cache": False,
        }
        kinds = ((False, "pixel_values", "image"), (True, "pixel_values_videos", "video"))
        for video, pixels, prefix in kinds:
            if items := [item for item in self.items if item.video == video]:
                inputs[pixels] = torch.cat([item.pixels for item in items]).float() / 127.5 - 1
                inputs[f"{prefix}_grid_thw"] = torch.tensor([item.grid for item in items])
                inputs[f"{prefix}_merge_sizes"] = torch.tensor([item.merge for item in items])
                if video:
                    inputs["video_compression_mask"] = torch.cat([item.keep for item in items])
        return inputs


def make_item(
    grid: tuple[int, int, int], merge: int, *, video: bool = False, drop: Sequence[int] = ()
) -> Item:
    patches = grid[0] * grid[1] * grid[2]
    keep = torch.ones(patches // merge**2, dtype=torch.bool)
    keep[list(drop)] = False
    return Item(grid, merge, keep, torch.randint(0, 256, (patches, PATCH_VALUES), dtype=torch.uint8), video)


def make_conversation(items: Sequence[Item], *, text: int, answer: int) -> Conversation:
    """Some text, each item's placeholders behind some text, and an answer of ``answer`` supervised tokens."""
    ids: list[int] = []
    for item in items:
        ids += torch.randint(0, IMAGE, (3,)).tolist()
        ids += [VIDEO if item.video else IMAGE] * int(item.keep.sum())
    ids += torch.randint(0, IMAGE, (text,)).tolist()
    ids_T = torch.tensor(ids)
    labels_T = torch.full_like(ids_T, IGNORE_INDEX)
    if answer:
        labels_T[-answer - 1 : -1] = ids_T[-answer:]
    return Conversation(ids_T, labels_T, list(items))


def row_and_column(item: Item) -> Tensor:
    """(P, 2) place of each patch, in merge-block order, the same in every frame."""
    frames, height, width = item.grid
    rows = torch.arange(height)[:, None].expand(height, width)
    columns = torch.arange(width).expand(height, width)
    blocks = (height // item.merge, item.merge, width // item.merge, item.merge)
    place = torch.stack([x.reshape(blocks).transpose(1, 2).flatten() for x in (rows, columns)], dim=-1)
    return place.repeat(frames, 1)


NO_FAMILY = {
    "prefix_rows": torch.zeros(0).long(),
    "branch_rows": torch.zeros(0).long(),
    "prefix_bounds": torch.zeros(1).int(),
    "branch_bounds": torch.zeros(1).int(),
}


def make_batch(conversations: Sequence[Conversation], num_loss_chunks: int = 2) -> Batch:
    """One pack, as contracts.records.Batch says."""
    lengths = [len(c.ids) for c in conversations]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    placed: list[tuple[Item, Tensor]] = []
    for conversation, start in zip(conversations, starts, strict=True):
        slots = torch.nonzero(conversation.ids >= IMAGE).flatten() + start
        for item in conversation.items:
            count = int(item.keep.sum())
            placed.append((item, slots[:count]))
            slots = slots[count:]
        assert len(slots) == 0
    placed.sort(key=lambda pair: pair[0].merge)
    dummy = Item((1, 2, 2), 2, torch.zeros(1, dtype=torch.bool), torch.zeros(4, PATCH_VALUES).byte(), False)
    items = [item for item, _ in placed] or [dummy]
    frames = [item.grid[1] * item.grid[2] for item in items for _ in range(item.grid[0])]
    by_merge: dict[int, int] = {}
    for item in items:
        by_merge[item.merge] = by_merge.get(item.merge, 0) + len(item.pixels)
    labels = torch.cat([c.labels for c in conversations])
    positions = torch.nonzero(labels != IGNORE_INDEX).flatten()
    segment_of_token = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return Batch(
        input_ids=torch.cat([c.ids for c in conversations]),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        pixel_values=torch.cat([item.pixels for item in items]),
        patch_positions=torch.cat([row_and_column(item) for item in items]),
        vision_cu_seqlens=torch.tensor([0, *frames]).cumsum(0).int(),
        kept=torch.nonzero(torch.cat([item.keep for item in items])).flatten(),
        placeholder_positions=torch.cat([slots for _, slots in placed]) if placed else torch.zeros(0).long(),
        supervised_positions=positions,
        supervised_labels=labels[positions],
        supervised_segments=segment_of_token[positions],
        **NO_FAMILY,
        segment_lengths=tuple(lengths),
        num_branches=(0,) * len(lengths),
        frame_lengths=tuple(frames),
        patches_by_merge=tuple(by_merge.items()),
        segment_sources=(0,) * len(lengths),
        segment_keys=tuple(f"test/{i}" for i in range(len(lengths))),
        num_loss_chunks=num_loss_chunks,
        num_planned_tokens=sum(lengths),
    )


def make_model(*, tied: bool = True, layers: int = 2, head_dim: int = 8, vision_head_dim: int = 12) -> Any:
    """A small model in which every weight matters: attention is far from uniform, norms and biases are not
    1 and 0."""
    from transformers import VideoLlama3Config, VideoLlama3ForConditionalGeneration

    config = VideoLlama3Config(
        text_config={
            "model_type": "qwen2",
            "hidden_size": 4 * head_dim,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCAB,
            "max_position_embeddings": 512,
            "tie_word_embeddings": tied,
            "use_cache": False,
        },
        vision_config={
            "hidden_size": 2 * vision_head_dim,
            "intermediate_size": 40,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_channels": 3,
            "patch_size": 14,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=tied,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(1)
    model = VideoLlama3ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.05 if "patch_embedding" in name else 0.25)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model


@contextlib.contextmanager
def kept_rows(model: Any, widths: Collection[int]) -> Iterator[set[int]]:
    """Addresses of matrices of such widths that forward passes keep for the backward pass; weights are none."""
    weights, kept = {parameter.data_ptr() for parameter in model.parameters()}, set()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.dim() == 2 and tensor.shape[1] in widths and tensor.data_ptr() not in weights:
            kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """Builds a small model with weights that matter."""
    return make_model


@pytest.fixture
def batch_of() -> Callable[..., Batch]:
    """Builds a pack of conversations."""
    return make_batch


@pytest.fixture
def mixed() -> list[Conversation]:
    """An image, two images, a pruned clip and an image, text only, one token, a clip that fills no odd
    grid."""
    torch.manual_seed(0)
    return [
        make_conversation([make_item((1, 4, 6), 1)], text=7, answer=4),
        make_conversation([make_item((1, 2, 2), 1), make_item((1, 6, 4), 2)], text=5, answer=2),
        make_conversation(
            [make_item((3, 4, 4), 2, video=True, drop=(4, 6, 7, 9)), make_item((1, 3, 5), 1)],
            text=9,
            answer=5,
        ),
        make_conversation([], text=12, answer=6),
        make_conversation([], text=1, answer=0),
        make_conversation([make_item((2, 2, 6), 2, video=True)], text=4, answer=1),
    ]


@pytest.fixture
def text_only() -> list[Conversation]:
    """Two conversations without visual items."""
    torch.manual_seed(0)
    return [make_conversation([], text=8, answer=3), make_conversation([], text=5, answer=2)]


@pytest.fixture
def stock_gradients() -> Callable[..., tuple[float, dict[str, Tensor]]]:
    """Summed loss and gradients of the stock forward, one conversation at a time, on a copy of the model."""

    def run(model: Any, conversations: Sequence[Conversation]) -> tuple[float, dict[str, Tensor]]:
        oracle = copy.deepcopy(model)
        oracle.set_attn_implementation("sdpa")
        total = 0.0
        for conversation in conversations:
            supervised = int((conversation.labels != IGNORE_INDEX).sum())
            if supervised:
                loss = oracle(**conversation.stock_inputs()).loss * supervised
                loss.backward()
                total += float(loss.detach())
        return total, {n: p.grad for n, p in oracle.named_parameters() if p.grad is not None}

    return run


@pytest.fixture(autouse=True)
def in_one_piece() -> Iterator[None]:
    """What is compiled is compiled whole: torch goes on without where its tracer cannot follow, and says nothing."""
    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    yield
    assert not breaks
