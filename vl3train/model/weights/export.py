"""A trained model written as a Hugging Face folder, loaded back with plain transformers and compared."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vl3train.contracts.files import whole_folder
from vl3train.model.weights.disk import disk_errors, refuse_full_disk
from vl3train.model.weights.hf_folder import WrongExport, locate_trained, verify_export, write_folder
from vl3train.model.weights.processor import keep_arguments_free, trained_fps


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """How well adapters went into the weights."""

    difference: (
        float  # the largest, of the logits of merged weights and those of weights and adapters apart, float32
    )
    largest: float  # of these logits, by absolute value
    change_lost: float  # share of the adapters' change that the written dtype could not keep
    in_4_bits: bool  # the weights were rounded to the 4 bits that the adapters were trained on


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written, and from what."""

    num_parameters: int
    dtype: torch.dtype
    num_bytes: int
    weights: Path  # folder of the weights it was made from
    adapter: Path | None  # folder of the adapters that were merged into them
    fps: float  # frames that training took from a second of a clip
    merged: Merged | None  # None without adapters


def export_model(source: str | Path, out: Path, *, dtype: str | None, needs_adapter: bool) -> Exported:
    """Write the whole model to ``out``, load it back and compare every tensor and the logits.

    Adapters are merged in float32 (4 bytes of memory a parameter), and the sum is cast to the dtype of the written
    weights. ``out`` appears when all comparisons have passed.

    Args:
        source: what ``locate_trained`` takes.
        out: must not exist.
        dtype: ``bfloat16`` or ``float32``, of the written weights; None keeps that of ``source``.
        needs_adapter: refuse a source without adapters.

    Raises:
        OSError, ValueError: the source is no trained model, or holds no adapters although some are needed, or the
            disk is full. Nothing is left.
        WrongExport: what was written differs from the model. It stays as ``OUT.differs``, to be looked at.
    """
    from transformers import AutoProcessor, VideoLlama3Config
    from transformers.utils import logging

    logging.disable_progress_bar()
    differs = out.with_name(out.name + ".differs")
    if differs.exists():
        raise FileExistsError(f"{differs} exists, what is left of a failed export: look at it and remove it")
    weights, adapter = locate_trained(source)
    if needs_adapter and adapter is None:
        raise ValueError(f"{source} holds no adapters to merge; leave --merge-adapter out")
    processor = keep_arguments_free(AutoProcessor.from_pretrained(str(weights), trust_remote_code=False))
    stored: Any = VideoLlama3Config.from_pretrained(str(weights)).dtype or torch.float32
    written: torch.dtype = getattr(torch, dtype) if dtype else stored
    model = _load(weights, stored if adapter is None else torch.float32)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    refuse_full_disk(out, num_parameters * written.itemsize)
    merged = None
    if adapter is not None:
        model, merged = merge_checked(model, adapter, processor, written)
    with whole_folder(out) as partial:
        with disk_errors(out):
            write_folder(model, processor, partial, dtype=written)
        num_bytes = sum(file.stat().st_size for file in partial.rglob("*"))
        try:
            loaded = verify_export(partial, model.state_dict())
            for parameter in model.parameters():  # not model.to(dtype): the rotary frequencies stay float32
                parameter.data = parameter.data.to(written)
            compare_logits(
                model, loaded, AutoProcessor.from_pretrained(str(partial), trust_remote_code=False)
            )
        except WrongExport:
            partial.rename(differs)
            raise
    return Exported(
        num_parameters=num_parameters,
        dtype=written,
        num_bytes=num_bytes,
        weights=weights,
        adapter=adapter,
        fps=trained_fps(processor),
        merged=merged,
    )


def export_adapter(source: str | Path, out: Path) -> tuple[Path, Path]:
    """Copy the adapters of ``source`` to ``out``, which must not exist; they name the folder of their weights.

    Returns:
        Folders of the adapters and of the weights they belong to.

    Raises:
        ValueError: ``source`` holds no adapters.
    """
    weights, adapter = locate_trained(source)
    if adapter is None:
        raise ValueError(f"{source} holds no adapters; leave --adapter-only out")
    with whole_folder(out) as partial, disk_errors(out):
        shutil.copytree(adapter, partial, dirs_exist_ok=True)
        file = partial / "adapter_config.json"
        config = json.loads(file.read_text())
        config["base_model_name_or_path"] = str(weights.resolve())
        file.write_text(json.dumps(config, indent=2, sort_keys=True))
    return adapter, weights


def merge_checked(base: Any, adapter: Path, processor: Any, dtype: torch.dtype) -> tuple[Any, Merged]:
    """Merge adapters into float32 weights, and compare the logits with those of base plus adapter kept apart.

    Args:
        base: a ``VideoLlama3ForConditionalGeneration`` in float32; it is used up.
        adapter: folder of the adapters.
        processor: makes the input.
        dtype: of the weights that will be written.

    Returns:
        The merged model in float32, and how well that went.

    Raises:
        WrongExport: the merged model answers otherwise.
    """
    from vl3train.model.adapters import BASE_FORM, load_adapter, merge_adapter, round_base

    inputs = probe(processor)
    round_base(base, adapter)
    without = logits_of(base, inputs)
    apart = load_adapter(base, adapter, is_trainable=False)
    expected = logits_of(apart, inputs)
    merged, lost = merge_adapter(apart, dtype)
    # The two sums round differently, by 1e-6 of the logits, more in deep models. A change that got lost is as large
    # as itself.
    allowed = 0.01 * (expected - without).abs().max() + 1e-4 * expected.abs().max()
    difference = (logits_of(merged, inputs) - expected).abs().max()
    if not difference <= allowed:
        raise WrongExport(
            f"the logits of the merged model differ by {difference:.3g} from those of {adapter} on its weights, more "
            f"than rounding does ({allowed:.3g}); nothing was written. --adapter-only writes the adapters unmerged"
        )
    return merged, Merged(
        difference=float(difference),
        largest=float(expected.abs().max()),
        change_lost=lost,
        in_4_bits=(adapter / BASE_FORM).is_file(),
    )


def compare_logits(model: Any, loaded: Any, processor: Any) -> None:
    """Raise WrongExport unless both models give equal logits for an image, a clip and text together."""
    inputs = probe(processor)
    expected, found = logits_of(model, inputs), logits_of(loaded, inputs)
    if not torch.equal(expected, found):
        difference = (expected - found).abs().max().item()
        raise WrongExport(f"the logits of the written model differ by up to {difference:.3g}")


def probe(processor: Any) -> Any:
    """The same small input each time: an image, a clip and text."""
    draw = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 70, 98), dtype=torch.uint8, generator=draw)
    clip = torch.randint(0, 256, (3, 3, 56, 84), dtype=torch.uint8, generator=draw)
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "What do you see?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(
        text=[text],
        images=[image],
        videos=[clip],
        videos_kwargs={
            "do_sample_frames": False,
            "video_metadata": [{"fps": 1.0, "total_num_frames": 3, "frames_indices": [0, 1, 2]}],
        },
        return_tensors="pt",
    )


def logits_of(model: Any, inputs: Any) -> Tensor:
    """The logits of a model on the CPU, in evaluation mode; pixels are cast to its dtype."""
    placed = {name: one.to(model.dtype) if one.is_floating_point() else one for name, one in inputs.items()}
    with torch.inference_mode():
        return model.eval()(**placed).logits


def _load(weights: Path, dtype: torch.dtype) -> Any:
    from transformers import VideoLlama3ForConditionalGeneration

    return VideoLlama3ForConditionalGeneration.from_pretrained(str(weights), dtype=dtype).eval()
