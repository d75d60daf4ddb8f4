"""Write a VideoLLaMA3 checkpoint in another layout: no training step, and every weight keeps its bytes and dtype.

  hf        transformers' form (video_llama_3), which every command here and plain transformers read
  released  the original code's release, DAMO-NLP-SG/VideoLLaMA3-* (videollama3_qwen2, with code of its own)
  training  what the original code's training reads and writes (pytorch_model.bin or safetensors)

The layout of SOURCE is found by itself. Of the original's training it may also be a part, the projector
(mm_projector.bin) or LoRA (adapter_config.json, non_lora_trainables.bin), with the whole model as --base. Weights go
from file to file, one shard at a time; no code in a checkpoint is run. OUT appears whole or not at all.

examples:
  vl3train convert VideoLLaMA3-7B VideoLLaMA3-7B-hf
  vl3train convert work_dirs/stage_4/checkpoint-2000 stage4-hf
  vl3train convert work_dirs/stage_1/mm_projector.bin stage1-hf --base VideoLLaMA3-2B-Image
  vl3train convert work_dirs/lora lora-hf --base VideoLLaMA3-7B      lora-hf/base and lora-hf/adapter
  vl3train convert runs/stage4/export VideoLLaMA3-mine --to released --like VideoLLaMA3-7B
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``vl3train convert``."""
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="folder of a checkpoint, or mm_projector.bin"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    parser.add_argument(
        "--to", choices=("hf", "released", "training"), default="hf", help="layout (default %(default)s)"
    )
    parser.add_argument(
        "--base", type=Path, metavar="FOLDER", help="the whole model that SOURCE is a part of"
    )
    parser.add_argument(
        "--like", type=Path, metavar="FOLDER", help="a release whose code and settings a released OUT gets"
    )


def main(args: argparse.Namespace) -> int:
    """Convert, print what was written; returns 0. Raises what model/weights/convert.py raises."""
    from vl3train.model.weights.convert import convert

    made = convert(
        args.source,
        args.out,
        to=args.to,
        base=args.base,
        like=args.like,
        progress=lambda text: print(text, file=sys.stderr),
    )
    print(
        f"wrote {args.out} ({args.to}) from {args.source} ({made.found}): {made.num_tensors} weights, "
        f"{made.num_bytes / 2**20:.1f} MiB, every byte as it was"
    )
    if made.has_adapter:
        print(
            f"{args.out}/adapter names {args.out}/base as its weights; vl3train export {args.out} MERGED merges them"
        )
    return 0
