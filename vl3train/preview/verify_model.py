"""The checks of ``vl3train verify`` on the model: packed equals alone, and alone equals transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vl3train.config.choices import Device
from vl3train.config.schema import PARTS, TrainConfig
from vl3train.contracts.records import Batch, Pack, RenderedSample
from vl3train.contracts.tokens import IGNORE_INDEX
from vl3train.data.render.families import cut_family
from vl3train.preview.verify_data import Verdict

if TYPE_CHECKING:
    from torch import Tensor


def fitting(samples: Sequence[RenderedSample], limits: tuple[int, int]) -> list[RenderedSample]:
    """As many of the samples as fit one pack; ``limits`` are its tokens and patches."""
    chosen: list[RenderedSample] = []
    tokens = patches = 0
    for sample in samples:
        if tokens + len(sample.input_ids) <= limits[0] and patches + len(sample.patches) <= limits[1]:
            chosen.append(sample)
            tokens, patches = tokens + len(sample.input_ids), patches + len(sample.patches)
    return chosen


def check_packed(model: Any, samples: Sequence[RenderedSample]) -> Verdict:
    """Whether samples that fit one pack have the same loss and the same gradients in it and each alone.

    We compare the gradients of the first and last matrix of every part, summed over the samples: the norm of the
    difference over the norm of the gradient.

    Args:
        model: a PackedModel, on its device.
        samples: rendered.
    """
    return _compared(model, samples, samples, "packed equals alone")


def check_family(model: Any, samples: Sequence[RenderedSample]) -> Verdict:
    """The same of samples that share a prefix, which ends with their last visual token, behind it and each alone."""
    first, *others = samples
    texts = [(sample.input_ids, sample.labels) for sample in others]
    shared = int(first.placeholder_positions[-1]) + 1
    members = cut_family(first, texts, [sample.key for sample in samples], shared)
    return _compared(model, members, samples, "behind a shared prefix equals alone")


def _compared(
    model: Any, members: Sequence[RenderedSample], samples: Sequence[RenderedSample], name: str
) -> Verdict:
    """``members`` are the segments of the pack, of which the last are those of ``samples``."""
    import torch

    in_float32 = next(model.parameters()).dtype == torch.float32
    # Sums over a sample's tokens; kernels add in another order for another row.
    allowed, allowed_apart = (1e-3, 1e-3) if in_float32 else (3e-2, 1e-1)
    with _watched(model) as weights:
        together, packed = _losses_and_gradients(model, members, weights)
        together = together[-len(samples) :]
        alone, summed = [], [torch.zeros_like(weight, dtype=torch.float32) for weight in weights.values()]
        for sample in samples:
            losses, gradients = _losses_and_gradients(model, [sample], weights)
            alone += losses
            for total, gradient in zip(summed, gradients, strict=True):
                total += gradient
    off = _relative(together, alone)
    reasons = [
        f"{sample.key}: loss {a:.5f} packed, {b:.5f} alone"
        for sample, a, b, apart in zip(samples, together, alone, off, strict=True)
        if apart > allowed
    ]
    apart = {
        name: float((ours - theirs).norm() / theirs.norm()) if theirs.any() else float(ours.norm())
        for name, ours, theirs in zip(weights, packed, summed, strict=True)
    }
    reasons += [
        f"gradient of {name}: differs by {value:.1e}"
        for name, value in apart.items()
        if not value <= allowed_apart
    ]
    if len(samples) < 2:
        reasons.append("fewer than two samples fit into one pack: nothing to compare")
    tokens = sum(len(member.input_ids) for member in members)
    found = (
        f"{len(samples)} samples, {tokens:,} tokens: losses differ by at most {max(off, default=0.0):.1e} "
        f"({allowed:g} allowed), gradients of {len(apart)} weights by {max(apart.values(), default=0.0):.1e} "
        f"({allowed_apart:g} allowed)"
    )
    return Verdict(name, not reasons, found, reasons)


def check_stock(model: Any, samples: Sequence[RenderedSample]) -> Verdict:
    """Whether each sample alone has the loss that transformers' own forward gives it, with the same weights."""
    import torch

    allowed = 1e-3 if next(model.parameters()).dtype == torch.float32 else 3e-2
    with torch.no_grad():
        ours = [float(model(_batch([sample], model)).loss_sum) for sample in samples]
        theirs = [_stock_loss(model.model, sample) for sample in samples]
    off = _relative(ours, theirs)
    reasons = [
        f"{sample.key}: loss {a:.5f} here, {b:.5f} by transformers"
        for sample, a, b, apart in zip(samples, ours, theirs, off, strict=True)
        if apart > allowed
    ]
    if not samples:
        reasons.append("no sample to compare")
    found = (
        f"{len(samples)} samples: losses differ by at most {max(off, default=0.0):.1e} ({allowed:g} allowed)"
    )
    return Verdict("equals transformers", not reasons, found, reasons)


def _relative(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True)]


@contextmanager
def _watched(model: Any) -> Iterator[dict[str, Tensor]]:
    """The first and last matrix of every part; only these get gradients within the block."""
    from vl3train.model.trainable import part_of

    matrices: dict[str, list[str]] = {part: [] for part in PARTS}
    named = {name: weight for name, weight in model.named_parameters() if weight.is_floating_point()}
    for name, weight in named.items():
        if weight.ndim > 1:
            matrices[part_of(name)].append(name)
    chosen = [name for names in matrices.values() for name in dict.fromkeys(names[:1] + names[-1:])]
    before = {name: weight.requires_grad for name, weight in named.items()}
    was_training = model.training
    for name, weight in named.items():
        weight.requires_grad_(name in chosen)
    model.training = True  # of the wrapper only: layers recompute as in a run, dropout stays off
    try:
        yield {name: named[name] for name in chosen}
    finally:
        model.training = was_training
        for name, weight in named.items():
            weight.requires_grad_(before[name])


def _losses_and_gradients(
    model: Any, members: Sequence[RenderedSample], weights: dict[str, Tensor]
) -> tuple[list[float], list[Tensor]]:
    """Each member's loss, and float32 gradients of their sum."""
    import torch

    batch = _batch(members, model)
    output = model(batch)
    gradients = torch.autograd.grad(output.loss_sum, list(weights.values()))
    sums = torch.zeros(len(members), dtype=torch.float64, device=output.token_losses.device)
    sums.index_add_(0, batch.supervised_segments, output.token_losses.double())
    return sums.tolist(), [gradient.float() for gradient in gradients]


def _batch(members: Sequence[RenderedSample], model: Any) -> Batch:
    from vl3train.data import collate as data_collate

    tokens = sum(len(sample.input_ids) for sample in members)
    patches = sum(len(sample.patches) for sample in members)
    pack = Pack(samples=(), num_tokens=tokens, num_patches=patches, num_supervised_tokens=0, cost=0)
    return data_collate.collate(members, pack, num_loss_chunks=1).to(next(model.parameters()).device)


def _stock_loss(hf_model: Any, sample: RenderedSample) -> float:
    """Summed loss of one sample by transformers' forward; logits of supervised tokens only."""
    import torch
    from torch.nn.functional import cross_entropy

    weight = next(hf_model.parameters())
    inputs = {
        name: torch.tensor(values, device=weight.device)
        for name, values in stock_inputs(sample, hf_model.config.video_token_id).items()
    }
    for name in {"pixel_values", "pixel_values_videos"} & set(inputs):
        inputs[name] = (inputs[name].float() / 127.5 - 1).to(weight.dtype)
    hidden = hf_model.model(**inputs, use_cache=False).last_hidden_state[0]
    labels = torch.tensor(sample.labels, device=weight.device)
    asked = labels != IGNORE_INDEX
    return float(cross_entropy(hf_model.lm_head(hidden[asked]).float(), labels[asked], reduction="sum"))


def stock_inputs(sample: RenderedSample, video_token_id: int) -> dict[str, np.ndarray]:
    """A sample as transformers' model takes it: images and clips in separate arrays, patches still uint8.

    The placeholders, which are in the order of the items, say which item is a clip.
    """
    found: dict[str, list[np.ndarray]] = {}
    patch = token = placed = 0
    for grid, merge in zip(sample.grids, sample.merge_sizes, strict=True):
        num_patches = int(np.prod(grid))
        keep = sample.keep_mask[token : token + num_patches // int(merge) ** 2]
        is_clip = sample.input_ids[sample.placeholder_positions[placed]] == video_token_id
        kind, pixels = ("video", "pixel_values_videos") if is_clip else ("image", "pixel_values")
        found.setdefault(pixels, []).append(sample.patches[patch : patch + num_patches])
        found.setdefault(f"{kind}_grid_thw", []).append(grid[None])
        found.setdefault(f"{kind}_merge_sizes", []).append(np.array([merge]))
        if is_clip:
            found.setdefault("video_compression_mask", []).append(keep)
        patch, token, placed = patch + num_patches, token + len(keep), placed + int(keep.sum())
    return {
        "input_ids": sample.input_ids[None],
        **{name: np.concatenate(arrays) for name, arrays in found.items()},
    }


def packed_model(cfg: TrainConfig, processor_dir: Path) -> Any:
    """The model that the run would start from, on the device it would run on. float32 on a CPU."""
    import torch

    from vl3train.engine.start.model import build_model
    from vl3train.model.attention.backends import choose_attention
    from vl3train.model.attention.check import right_attention
    from vl3train.model.kernels.check import choose_gemm_backend
    from vl3train.model.packed_forward import PackedModel, head_dims

    on_cuda = cfg.machine.device is not Device.cpu and torch.cuda.is_available()
    device = torch.device("cuda" if on_cuda else "cpu")
    model = build_model(cfg, None, processor_dir)
    model = model.to(device) if on_cuda else model.float()
    dtype, machine = next(model.parameters()).dtype, cfg.machine
    if cfg.data.share_prefix:
        shapes = model.config, device, head_dims(model), dtype
        attention = right_attention(machine.attention.value, *shapes, shares_prefix=True)
    else:
        attention = choose_attention(machine.attention.value, device, head_dims(model), dtype)
    gemm_backend = choose_gemm_backend(
        machine.gemm_backend.value, model.config, device, dtype, compiled=machine.compile_layers
    )
    return PackedModel(
        model,
        attention.name,
        recompute_vision=machine.recompute_vision,
        recompute_language=machine.recompute_language,
        compile_layers=machine.compile_layers,
        gemm_backend=gemm_backend.name,
    ).eval()
