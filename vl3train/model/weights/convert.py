"""A checkpoint in another layout, without a training step: names and config.json change, no byte of a weight does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, VideoLlama3Config

from vl3train.contracts.files import whole_folder
from vl3train.contracts.tokens import END_OF_TEXT, IM_END, IMAGE_TAG
from vl3train.model.weights.disk import disk_errors, refuse_full_disk
from vl3train.model.weights.from_parts import convert_original_config, placeholder_ids
from vl3train.model.weights.headers.faults import Fault, listed, read_object, refuse
from vl3train.model.weights.headers.files import read_stored
from vl3train.model.weights.layouts import from_hf, layout_of, original_config
from vl3train.model.weights.original_parts import add_parts, is_parts, write_adapter
from vl3train.model.weights.processor import build_processor, prepare_tokenizer
from vl3train.model.weights.streaming import SHARD_BYTES, Reader, Source, write_weights

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What was written, and from what."""

    found: str  # layout of the source
    num_tensors: int
    num_bytes: int
    has_adapter: bool  # OUT/base has the weights, OUT/adapter the adapters that belong to them


def convert(
    source: Path,
    out: Path,
    *,
    to: str = "hf",
    base: Path | None = None,
    like: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[str], None] = lambda text: None,
) -> Converted:
    """Write the checkpoint in ``source`` to ``out`` in the layout ``to``; ``out`` appears whole or not at all.

    Args:
        source: a folder in any of ``layouts.LAYOUTS``, or what the original's training writes of a part: the
            projector (``mm_projector.bin``, or its folder) or LoRA (``adapter_config.json`` and
            ``non_lora_trainables.bin``).
        out: must not exist.
        to: one of ``layouts.LAYOUTS``; a LoRA checkpoint goes to ``hf`` only.
        base: for a part: the folder of the whole model that it belongs to, in any layout.
        like: for ``released``: a folder of the release, whose code, chat template and settings are copied.
        shard_bytes: most bytes of a written file.
        progress: gets a line after each file.

    Raises:
        OSError, ValueError: something is missing, damaged or does not fit, or the disk is full; all is named at once.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; nothing was written. Give another folder or remove that one")
    parts = is_parts(source)
    if parts and base is None:
        raise ValueError(f"{source} holds parts of a model only: name the whole one with --base FOLDER")
    if base is not None and not parts:
        raise ValueError(f"{source} is a whole model; leave --base out")
    if to == "released" and like is None:
        raise ValueError(
            "a released folder has code and settings of its own: name one with --like FOLDER (a download of "
            "DAMO-NLP-SG/VideoLLaMA3-2B or another of them; its weights are not needed)"
        )
    whole = base if base is not None else source
    config, weights, found = read_whole(whole)
    has_adapter = add_parts(source, weights) if parts else False
    if has_adapter and to != "hf":
        raise ValueError(
            "a LoRA checkpoint is converted to hf; merge it with `vl3train export` before --to another"
        )
    refuse(source, shape_faults(config, weights))
    refuse_full_disk(out, sum(one.num_bytes for one in weights.values()))
    with whole_folder(out) as partial:
        folder = partial / "base" if has_adapter else partial
        folder.mkdir(exist_ok=True)
        named = {from_hf(name, to): one for name, one in weights.items()}
        with disk_errors(out):
            write_weights(named, folder, shard_bytes=shard_bytes, progress=progress)
        dtype = DTYPES[
            next(one for name, one in weights.items() if name.endswith("embed_tokens.weight")).stored.dtype
        ]
        if to == "hf":
            write_hf(config, whole, folder, dtype)
        else:
            write_original(config, whole, folder, dtype, to, like)
        if has_adapter:
            write_adapter(source, partial / "adapter", base=out / "base")
    return Converted(
        found=("LoRA" if has_adapter else "projector") if parts else found,
        num_tensors=len(weights),
        num_bytes=sum(one.num_bytes for one in weights.values()),
        has_adapter=has_adapter,
    )


def read_whole(folder: Path) -> tuple[VideoLlama3Config, dict[str, Source], str]:
    """Config and weights of a whole model under transformers' names, and the layout it has.

    Only headers are read. Raises ValueError with all that is missing or damaged.
    """
    from vl3train.model.weights.headers.described import describe_whole

    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    described, fault = read_object(folder / "config.json")
    refuse(folder, [fault] if fault else [])
    if described.get("model_type") not in ("video_llama_3", "videollama3_qwen2"):
        raise ValueError(f"{folder} has model_type {described.get('model_type')}: it is no VideoLLaMA3")
    stored = read_stored(folder)
    refuse(folder, [*describe_whole(described).faults, *stored.faults])
    rename = describe_whole(described).rename
    weights = {
        new: Source(folder / one.file, name, one)
        for name, one in stored.tensors.items()
        if (new := rename(name)) is not None
    }
    found = layout_of(described, stored.tensors)
    config: Any = (
        VideoLlama3Config.from_pretrained(str(folder))
        if found == "hf"
        else convert_original_config(described, **placeholder_ids(folder))
    )
    if config.tie_word_embeddings and "lm_head.weight" in weights:
        drop_tied_head(folder, weights)
    return config, weights, found


def drop_tied_head(folder: Path, weights: dict[str, Source]) -> None:
    """Leave a head that is the embedding out. Raises ValueError where it is another."""
    head, embedding = weights.pop("lm_head.weight"), weights["model.language_model.embed_tokens.weight"]
    with Reader() as reader:
        if not torch.equal(reader.tensor(head), reader.tensor(embedding)):
            raise ValueError(f"{folder}: config.json ties lm_head and embed_tokens, but they differ")


def shape_faults(config: Any, weights: dict[str, Source]) -> list[Fault]:
    """Weights that are missing, unknown, or of another shape than the config says."""
    from vl3train.model.weights.headers.described import describe_whole

    expected = describe_whole(config.to_dict()).tensors()
    way_out = "take a whole checkpoint, with the config.json that belongs to it"
    faults = []
    if missing := expected.keys() - weights.keys():
        faults.append(Fault(f"{len(missing)} weights are missing: {listed(missing)}", way_out))
    if unknown := weights.keys() - expected.keys():
        faults.append(Fault(f"{len(unknown)} weights are unknown: {listed(unknown)}", way_out))
    wrong = [
        name for name in expected.keys() & weights.keys() if weights[name].stored.shape != expected[name]
    ]
    if wrong:
        faults.append(Fault(f"{len(wrong)} weights have another shape: {listed(wrong)}", way_out))
    return faults


def write_hf(config: Any, source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Config, generation settings and processor beside the weights, in transformers' form."""
    config.architectures = ["VideoLlama3ForConditionalGeneration"]
    config.text_config.use_cache = True
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    config.save_pretrained(folder)
    stored, _ = read_object(source / "processor_config.json")
    if "video_processor" in stored:  # a folder in Hugging Face form keeps its own
        from transformers import AutoProcessor

        processor: Any = AutoProcessor.from_pretrained(str(source), trust_remote_code=False)
    else:
        processor = build_processor(
            source,
            image_merge_size=int(stored.get("image_merge_size", 1)),
            video_merge_size=int(stored.get("video_merge_size", 2)),
        )
    tokenizer = processor.tokenizer
    GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids(IM_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        do_sample=False,
    ).save_pretrained(folder)
    processor.save_pretrained(folder)


def write_original(
    config: Any, source: Path, folder: Path, dtype: torch.dtype, layout: str, like: Path | None
) -> None:
    """Config, tokenizer, and for a release its code and settings, as the original code reads them."""
    tokenizer = prepare_tokenizer(source)
    auto_map: dict[str, str] = {}
    if like is not None:
        described, fault = read_object(like / "config.json")
        refuse(like, [fault] if fault else [])
        auto_map = described.get("auto_map", {})
    tokenizer.save_pretrained(folder)
    if like is not None:
        for file in like.iterdir():
            mine = file.name.startswith(("config.json", "tokenizer", "model")) and file.suffix == ".json"
            if file.is_file() and file.suffix not in WEIGHT_SUFFIXES and not mine:
                shutil.copyfile(file, folder / file.name)
        (folder / "chat_template.jinja").unlink(missing_ok=True)  # the release has chat_template.json
    described = original_config(
        config,
        layout,
        dtype=str(dtype).removeprefix("torch."),
        image_tag_id=tokenizer.convert_tokens_to_ids(IMAGE_TAG),
        prune_frames=True,
        auto_map=auto_map,
    )
    (folder / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
