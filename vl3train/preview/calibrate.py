"""What tokens and patches cost on this machine: the time of made-up packs, fitted to what they hold."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vl3train.config.paths import tokenizer_source
from vl3train.config.rules import full_rates
from vl3train.config.schema import TrainConfig
from vl3train.contracts.records import Pack, RenderedSample
from vl3train.contracts.tokens import IGNORE_INDEX, PATCH_VALUES
from vl3train.data.plan.costs import COSTS

if TYPE_CHECKING:
    from vl3train.contracts.records import Batch

UNIT = 4_000_000
"""A token and a patch together count this much: integers fine enough, and far from 64 bits."""


class Kind(NamedTuple):
    """A made-up pack: ``samples`` of ``tokens`` each, with ``frames`` of ``side`` x ``side`` patches in each sample."""

    samples: int
    tokens: int
    frames: int = 0
    side: int = 0


def measured_costs(
    cfg: TrainConfig, *, repeats: int, progress: Callable[[Kind, float], None]
) -> tuple[dict[str, int], float]:
    """Time forward and backward of the stage's model over packs of every kind, and fit the costs.

    Args:
        cfg: of the run; its model starts as the run's would.
        repeats: times that each pack runs, after one run to warm up; the fastest counts.
        progress: is called with each pack's kind and its seconds.

    Returns:
        ``model.costs``, and the mean relative error of the fit.
    """
    from vl3train.model.trainable import set_trainable
    from vl3train.model.weights.processor import build_processor
    from vl3train.preview.verify_model import packed_model

    with tempfile.TemporaryDirectory() as folder:
        build_processor(tokenizer_source(cfg)).save_pretrained(folder)
        model = packed_model(cfg, Path(folder))
    set_trainable(model.model, full_rates(cfg))
    model.train()
    found = []
    for kind in kinds(cfg.step.max_tokens, cfg.step.max_patches):
        batch = made_batch(kind, cfg.stage.video_merge_size)
        seconds = min(step_seconds(model, batch) for _ in range(repeats + 1))
        found.append((quantities(batch), seconds))
        progress(kind, seconds)
    return fitted_costs(found)


def kinds(max_tokens: int, max_patches: int) -> list[Kind]:
    """Packs that separate the four costs: samples that are many and short or few and long, frames small and large."""
    found = [Kind(count, max_tokens // share // count) for share in (1, 2) for count in (1, 8, 32)]
    for patches in (max_patches, max_patches // 2):
        for side in (8, 16, 32, 64):
            if frames := patches // side**2:
                found.append(Kind(1, max_tokens // 2, frames, side))
    return found


def made_batch(kind: Kind, merge_size: int) -> Batch:
    """A batch of that kind; pixels are grey, half of the tokens are supervised. Tokens are at least the visual ones."""
    from vl3train.data.collate import collate

    num_patches = kind.frames * kind.side**2
    num_visual = num_patches // merge_size**2
    # Where frames have more tokens than the sample, the rest is pruned, as in clips: the encoder sees it all the same.
    kept = min(num_visual, kind.tokens // 2)
    labels = np.where(np.arange(kind.tokens) % 2, 0, IGNORE_INDEX)
    sample = RenderedSample(
        key="made",
        source=0,
        input_ids=np.zeros(kind.tokens, np.int64),
        labels=labels,
        patches=np.full((num_patches, PATCH_VALUES), 127, np.uint8),
        grids=np.array([[kind.frames, kind.side, kind.side]] if kind.frames else [], np.int64).reshape(-1, 3),
        merge_sizes=np.array([merge_size] if kind.frames else [], np.int64),
        keep_mask=np.arange(num_visual) < kept,
        placeholder_positions=np.arange(kept),
    )
    pack = Pack(samples=(), num_tokens=0, num_patches=0, num_supervised_tokens=0, cost=0)
    return collate([sample] * kind.samples, pack, num_loss_chunks=8)


def quantities(batch: Batch) -> list[int]:
    """1, tokens, token pairs, patches, patch pairs of a batch."""
    tokens, frames = np.array(batch.segment_lengths), np.array(batch.frame_lengths)
    return [1, int(tokens.sum()), int((tokens**2).sum()), int(frames.sum()), int((frames**2).sum())]


def step_seconds(model: Any, batch: Batch) -> float:
    """Seconds of one forward and backward pass."""
    import torch

    device = next(model.parameters()).device
    placed = batch.to(device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    model(placed).loss_sum.backward()
    wait()
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds


def fitted_costs(found: Sequence[tuple[Sequence[int], float]]) -> tuple[dict[str, int], float]:
    """Costs by least squares of relative errors, none below 0, and the mean relative error.

    Args:
        found: what each pack holds, see ``quantities``, and its seconds.

    Returns:
        ``model.costs``; a token and a patch together are ``UNIT``.
    """
    held = np.array([row for row, _ in found], float)
    seconds = np.array([time for _, time in found])
    weighted = held / seconds[:, None]
    scale = weighted.max(axis=0)
    free = list(range(held.shape[1]))
    while True:  # what comes out negative is taken as 0, the worst first
        solution = np.zeros(held.shape[1])
        solution[free] = np.linalg.lstsq(weighted[:, free] / scale[free], np.ones(len(found)), rcond=None)[0]
        if solution.min() >= 0:
            break
        free.remove(int(solution.argmin()))
    solution /= scale
    error = float(np.abs(held @ solution / seconds - 1).mean())
    whole = UNIT / max(solution[1] + solution[3], 1e-30)
    return {name: round(value * whole) for name, value in zip(COSTS, solution[1:], strict=True)}, error
