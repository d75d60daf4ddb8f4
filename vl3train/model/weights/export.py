"""A trained model written as a Hugging Face folder, loaded back with plain transformers and compared."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vl3train.contracts.files import whole_folder
from vl3train.model.weights.hf_folder import (
    WrongExport,
    load_trained,
    locate_trained,
    save_weights,
    verify_export,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written, and from what."""

    num_parameters: int
    dtype: torch.dtype
    num_bytes: int
    weights: Path  # folder of the weights it was made from
    adapter: Path | None  # folder of the adapters that were merged into them


def export_model(source: str | Path, out: Path, *, dtype: str | None, needs_adapter: bool) -> Exported:
    """Write the whole model to ``out``, load it back and compare every tensor and the logits.

    Args:
        source: what ``locate_trained`` takes.
        out: must not exist.
        dtype: ``bfloat16`` or ``float32``, of the written weights; None keeps that of ``source``.
        needs_adapter: refuse a source without adapters.

    Raises:
        OSError, ValueError: the source is no trained model, or holds no adapters although some are needed.
        WrongExport: what was written differs from the model. It stays as ``OUT.differs``, to be looked at.
    """
    from transformers import AutoProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    weights, adapter = locate_trained(source)
    if needs_adapter and adapter is None:
        raise ValueError(f"{source} holds no adapters to merge; leave --merge-adapter out")
    model, processor = load_trained(source)
    written: torch.dtype = getattr(torch, dtype) if dtype else model.dtype
    save_weights(model, processor, out, dtype=written)
    try:
        loaded = verify_export(out, model.state_dict())
        for parameter in model.parameters():  # not model.to(dtype): the rotary frequencies stay float32
            parameter.data = parameter.data.to(written)
        compare_logits(model, loaded, AutoProcessor.from_pretrained(str(out)))
    except WrongExport:
        out.rename(out.with_name(out.name + ".differs"))
        raise
    return Exported(
        num_parameters=sum(parameter.numel() for parameter in loaded.parameters()),
        dtype=written,
        num_bytes=sum(file.stat().st_size for file in out.rglob("*")),
        weights=weights,
        adapter=adapter,
    )


def export_adapter(source: str | Path, out: Path) -> tuple[Path, Path]:
    """Copy the adapters of ``source`` to ``out``, which must not exist.

    Returns:
        Folders of the adapters and of the weights they belong to.

    Raises:
        ValueError: ``source`` holds no adapters.
    """
    weights, adapter = locate_trained(source)
    if adapter is None:
        raise ValueError(f"{source} holds no adapters; leave --adapter-only out")
    with whole_folder(out) as partial:
        shutil.copytree(adapter, partial, dirs_exist_ok=True)
    return adapter, weights


def compare_logits(model: Any, loaded: Any, processor: Any) -> None:
    """Raise WrongExport unless both models give equal logits for an image, a clip and text together."""
    draw = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 70, 98), dtype=torch.uint8, generator=draw)
    clip = torch.randint(0, 256, (3, 3, 56, 84), dtype=torch.uint8, generator=draw)
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "What do you see?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(
        text=[text],
        images=[image],
        videos=[clip],
        videos_kwargs={
            "do_sample_frames": False,
            "video_metadata": [{"fps": 1.0, "total_num_frames": 3, "frames_indices": [0, 1, 2]}],
        },
        return_tensors="pt",
    )
    inputs = inputs.to(dtype=loaded.dtype)
    with torch.inference_mode():
        expected = model.eval()(**inputs).logits
        found = loaded.eval()(**inputs).logits
    if not torch.equal(expected, found):
        difference = (expected - found).abs().max().item()
        raise WrongExport(f"the logits of the written model differ by up to {difference:.3g}")
