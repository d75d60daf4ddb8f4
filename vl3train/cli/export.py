"""Write a trained model as a Hugging Face folder: weights, processor and chat template.

The command loads the folder back with plain transformers, and compares every tensor and the logits of an input with
an image, a clip and text. It never changes a folder that exists, and OUT appears when all of this has passed.

Adapters are merged in float32 and then cast. bfloat16 keeps 8 bits of a weight, so a small change is mostly lost in
it: the command prints how much. --dtype float32 keeps the change, and --adapter-only writes it unmerged.

examples:
  vl3train export runs/stage4 export                     the newest checkpoint of a run
  vl3train export runs/stage4/checkpoints/step_00000500 export --dtype bfloat16
  vl3train export runs/lora export --dtype float32       adapters are merged into the weights
  vl3train export runs/lora adapter --adapter-only       the adapters alone, for peft
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vl3train.model.weights.export import Merged

NOTABLE_LOSS = 0.01
"""Share of the adapters' change: above it the command warns."""

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

# A clip: {{"type": "video", "video": "clip.mp4"}}, and processor_kwargs={{"fps": {fps:g}}} in the call above.
# Without fps or num_frames, transformers takes every frame of a clip: thousands, and more memory than there is.
# transformers decodes paths with torchcodec (pip install 'vl3train[video]', and FFmpeg's libraries).
"""

ADAPTER_SNIPPET = """
from peft import PeftModel
from transformers import VideoLlama3ForConditionalGeneration

base = VideoLlama3ForConditionalGeneration.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(base, "{folder}")
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``vl3train export``."""
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="a run's output folder or a checkpoint")
    parser.add_argument("out", metavar="OUT", help="folder to write; must not exist")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="number format of the written weights (default: unchanged)",
    )
    adapters = parser.add_mutually_exclusive_group()
    adapters.add_argument(
        "--merge-adapter",
        "--merge",
        action="store_true",
        help="refuse a source that has no adapters (adapters are always merged)",
    )
    adapters.add_argument("--adapter-only", action="store_true", help="write the adapters alone, for peft")


def main(args: argparse.Namespace) -> int:
    """Export, compare, print what was written; returns 0. Raises what model/weights/export.py raises."""
    out = Path(args.out)
    if out.exists():
        raise FileExistsError(f"{out} exists; nothing was written. Give another folder or remove that one")

    from vl3train.model.weights.export import export_adapter, export_model
    from vl3train.model.weights.headers.template import export_remark
    from vl3train.model.weights.hf_folder import refuse_damaged

    refuse_damaged(args.source)
    if args.adapter_only:
        adapter, base = export_adapter(args.source, out)
        print(f"wrote {out}: the adapters of {adapter}\n" + ADAPTER_SNIPPET.format(base=base, folder=out))
        return 0
    made = export_model(args.source, out, dtype=args.dtype, needs_adapter=args.merge_adapter)
    remark = export_remark(Path(args.source).expanduser(), made.weights)
    if frames_by_the_original(Path(args.source)):
        print(
            "WARNING: this run trained with data.frame_sampling=original, which transformers' processor does not have: "
            "with fps= it takes other frames. Ask with `vl3train generate`, or choose frames yourself (docs/exports.md)"
        )
    print(
        f"wrote {out}: {made.num_parameters:,} parameters, {made.dtype}, {made.num_bytes / 2**20:.1f} MiB\n"
        f"from {made.weights}\n"
        + (merged_text(made.merged, made.adapter, made.dtype) if made.merged and made.adapter else "")
        + (f"{remark}\n" if remark else "")
        + "loaded back with from_pretrained: no missing or unexpected key, every tensor and the logits equal\n"
        + SNIPPET.format(folder=out, fps=made.fps)
    )
    return 0


def frames_by_the_original(source: Path) -> bool:
    """Whether the run that ``source`` is, or is a checkpoint of, chose frames as the original code does."""
    import yaml

    for folder in (source, source.parent.parent):
        file = folder / "config.yaml"
        if file.is_file():
            config = yaml.safe_load(file.read_text(encoding="utf-8"))
            return isinstance(config, dict) and (config.get("data") or {}).get("frame_sampling") == "original"
    return False


def merged_text(merged: Merged, adapter: Path, dtype: object) -> str:
    """What became of the adapters."""
    rounded = "onto the weights rounded to 4 bits that they were trained on, " if merged.in_4_bits else ""
    text = (
        f"with the adapters of {adapter}, merged in float32 {rounded}and compared with adapters kept apart:\n"
        f"the logits differ by {merged.difference:.2g} at most, of up to {merged.largest:.3g}\n"
    )
    if merged.change_lost < NOTABLE_LOSS:
        return f"{text}{dtype} keeps their change up to {merged.change_lost:.2g} of it\n"
    return (
        f"{text}WARNING: {dtype} loses {merged.change_lost:.0%} of their change (norm of what is lost over norm of "
        "the change).\nTo keep it, export with --dtype float32, or with --adapter-only for peft\n"
    )
