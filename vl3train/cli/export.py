"""Write a trained model as a Hugging Face folder: model, processor, chat template.

It is loaded back with plain transformers, and every tensor and the logits of a small mixed input are
compared. An existing folder is never touched.

examples:
  vl3train export runs/stage4 export                     the newest checkpoint of a run
  vl3train export runs/stage4/checkpoints/step_00000500 export --dtype bfloat16
  vl3train export runs/lora export                       adapters merged into the weights
  vl3train export runs/lora adapter --adapter-only       the adapters alone, for peft
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

SNIPPET = """
from transformers import AutoProcessor, VideoLlama3ForConditionalGeneration

model = VideoLlama3ForConditionalGeneration.from_pretrained("{folder}", dtype="auto")
processor = AutoProcessor.from_pretrained("{folder}")
messages = [{{"role": "user", "content": [{{"type": "image", "image": "picture.jpg"}},
                                        {{"type": "text", "text": "What is this?"}}]}}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**inputs, max_new_tokens=128)
print(processor.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""

ADAPTER_SNIPPET = """
from peft import PeftModel
from transformers import VideoLlama3ForConditionalGeneration

base = VideoLlama3ForConditionalGeneration.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(base, "{folder}")
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``vl3train export``."""
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="a run's output folder or a checkpoint")
    parser.add_argument("out", metavar="OUT", help="folder to write; must not exist")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="of the written weights; unset: as they are"
    )
    adapters = parser.add_mutually_exclusive_group()
    adapters.add_argument(
        "--merge-adapter",
        action="store_true",
        help="refuse a source without adapters; they are merged anyway",
    )
    adapters.add_argument(
        "--adapter-only", action="store_true", help="write the adapters alone, in peft's form"
    )


def main(args: argparse.Namespace) -> int:
    """Export, prove it equal, say so, return 0. Raises what export_model and export_adapter raise."""
    out = Path(args.out)
    if out.exists():
        raise FileExistsError(f"{out} exists; nothing was written. Give another folder or remove that one")
    print(export_adapter(args.source, out) if args.adapter_only else export_model(args, out))
    return 0


def export_model(args: argparse.Namespace, out: Path) -> str:
    """Write the whole model to ``out``, prove it, and say what was written.

    Raises:
        OSError, ValueError: The source is no trained model, or holds no adapters where some are asked for.
        WrongExport: What was written differs from the model; it is left for a look, under another name.
    """
    import torch
    from transformers import AutoProcessor
    from transformers.utils import logging

    from vl3train.model.weights.hf_folder import (
        WrongExport,
        load_trained,
        locate_trained,
        save_weights,
        verify_export,
    )

    logging.disable_progress_bar()
    weights, adapter = locate_trained(args.source)
    if args.merge_adapter and adapter is None:
        raise ValueError(f"{args.source} holds no adapters to merge; leave --merge-adapter out")
    model, processor = load_trained(args.source)
    dtype: torch.dtype = getattr(torch, args.dtype) if args.dtype else model.dtype
    save_weights(model, processor, out, dtype=dtype)
    try:
        loaded = verify_export(out, model.state_dict())
        for parameter in model.parameters():  # not model.to(dtype): the rotary frequencies stay float32
            parameter.data = parameter.data.to(dtype)
        compare_logits(model, loaded, AutoProcessor.from_pretrained(str(out)))
    except WrongExport:
        out.rename(out.with_name(out.name + ".differs"))
        raise
    count = sum(parameter.numel() for parameter in loaded.parameters())
    size = sum(file.stat().st_size for file in out.rglob("*"))
    merged = f", adapters of {adapter} merged" if adapter else ""
    return (
        f"wrote {out}: {count:,} parameters, {dtype}, {size / 2**20:.1f} MiB{merged}\n"
        f"from {weights}\n"
        "loaded back with from_pretrained: no missing or unexpected key, every tensor and the logits equal\n"
        + SNIPPET.format(folder=out)
    )


def export_adapter(source: str, out: Path) -> str:
    """Copy the adapters of ``source`` to ``out`` and say how to use them.

    Raises:
        ValueError: ``source`` holds no adapters.
    """
    from vl3train.model.weights.hf_folder import locate_trained

    weights, adapter = locate_trained(source)
    if adapter is None:
        raise ValueError(f"{source} holds no adapters; leave --adapter-only out")
    partial = out.with_name(f".{out.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    shutil.copytree(adapter, partial)
    partial.rename(out)
    return f"wrote {out}: the adapters of {adapter}\n" + ADAPTER_SNIPPET.format(base=weights, folder=out)


def compare_logits(model: Any, loaded: Any, processor: Any) -> None:
    """Raise WrongExport unless both models give equal logits for an image, a clip and text together."""
    import torch

    from vl3train.model.weights.hf_folder import WrongExport

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
        raise WrongExport(f"the logits of what was written differ by up to {difference:.3g}")
