"""Make the parts of a small VideoLLaMA3: a published Llama as a Qwen2, and a vision encoder with random weights.

SOURCE is a .gguf file (pip install gguf), a folder in Hugging Face form or a hub name. Its tokenizer needs ChatML's
tokens, as that of SmolLM2-135M-Instruct has them. A Qwen2 with zero biases computes what the Llama does; the command
compares the logits of both. The encoder knows nothing yet: stage 1 trains it, at larger rates than the paper's.

OUT appears whole or not at all, with vision_encoder/ and language_model/. Stage 1 with model=smollm2 looks for them in
the folder parts of data.root.

examples:
  vl3train parts SmolLM2-135M-Instruct.Q4_1.gguf data/parts
  vl3train parts HuggingFaceTB/SmolLM2-135M-Instruct data/parts
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``vl3train parts``."""
    parser.add_argument("source", metavar="SOURCE", help="a Llama: .gguf file, folder or hub name")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    parser.add_argument("--seed", type=int, default=0, help="of the encoder's weights (default 0)")


def main(args: argparse.Namespace) -> int:
    """Make the parts, print what was written; returns 0. Raises what demo/llama.py raises."""
    from vl3train.contracts.files import whole_folder
    from vl3train.demo.llama import write_language_model
    from vl3train.demo.parts import SMALL_ENCODER, make_vision_encoder

    out: Path = args.out
    if out.exists():
        raise FileExistsError(f"{out} exists; nothing was written. Give another folder or remove that one")
    with whole_folder(out) as partial:
        (partial / "language_model").mkdir()
        num_parameters = write_language_model(args.source, partial / "language_model")
        make_vision_encoder(partial / "vision_encoder", args.seed, SMALL_ENCODER)
    print(
        f"wrote {out}: a language model of {num_parameters:,} parameters, with the logits of {args.source}, and "
        f"an encoder of {SMALL_ENCODER.vision_layers} layers with random weights"
    )
    return 0
