"""What records of the same clip or image cost when it is read, decoded, encoded and prefilled once (docs/families.md).

    python -m benchmarks.families reading [--debug] [--no-keep]
    python -m benchmarks.families gpu [--mix clip_8 image_4 alone] [--steps 3] [--debug] [--no-keep]
    python -m benchmarks.families curve [--debug] [--no-keep]

reading: eight short questions on each clip, in shards with a member for each record, each loaded alone, beside shards
with one for each family, loaded together. Both are indexed with pruning, and loaded for one virtual epoch. Bytes are
those that the index pass and the loader read of the shards; frames are those that the decode sandbox is asked to
decode. ``--debug`` takes few short clips.

gpu: optimizer steps of the 2B on one GPU, as row 2b of benchmarks/one_gpu.py makes them, over the same records apart
and behind shared prefixes (benchmarks/gpu/families.py). clip_8: eight questions of 30 tokens with answers of 20 on
each clip of 64 frames, about 5 000 visual tokens. image_4: four captions of 150 tokens on each image of 1 600 patches.
alone: one record a medium, the mix of benchmarks/one_gpu.py. ``--steps`` are those with shared prefixes; apart as many
as their records fill. ``--debug`` trains two layers on the CPU.

curve: 200 steps of the train command on the CPU, with shared prefixes and apart (benchmarks/curves/family_runs.py).

Prints one JSON line a figure and adds it to benchmarks/results/families.jsonl (or $OUT), as soon as it is taken.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.curves.family_runs import measure_curve
from benchmarks.data.drawn_media import write_clip
from benchmarks.data.drawn_shards import write_tokenizer
from benchmarks.figures import Figures
from benchmarks.gpu.families import MIX_NAMES, measure_families
from benchmarks.one_gpu import results_folder
from vl3train.config.choices import Device
from vl3train.config.schema import (
    DataConfig,
    MachineConfig,
    ModelConfig,
    RunConfig,
    StageConfig,
    StepConfig,
    TrainConfig,
)
from vl3train.contracts.records import Cursor, SampleError
from vl3train.data.pipeline import open_data, train_steps
from vl3train.data.prepare import build_index
from vl3train.data.prepare.annotated_records import AnnotatedRecords
from vl3train.data.prepare.write_shards import write_shards
from vl3train.data.render.decode_client import Decoder
from vl3train.data.shards import index as shards_index
from vl3train.engine.ranks import ALLOCATOR

RECORDS = 8
"""Questions on each clip."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True)
    reading, gpu, curve = (commands.add_parser(name) for name in ("reading", "gpu", "curve"))
    reading.add_argument("--debug", action="store_true", help="a minute on one core: three clips of 8 frames")
    gpu.add_argument("--debug", action="store_true", help="two-layer model on the CPU; nothing is kept")
    gpu.add_argument("--mix", nargs="+", default=list(MIX_NAMES), choices=MIX_NAMES)
    gpu.add_argument("--steps", type=int, default=3, help="with shared prefixes, of each mix")
    curve.add_argument("--debug", action="store_true", help="a few steps; nothing is kept")
    for command in (reading, gpu, curve):
        command.add_argument("--no-keep", action="store_true", help="print only")
    args = parser.parse_args()
    keep = not (args.no_keep or args.debug)
    if args.what == "reading":
        packages = ("av", "numpy", "torch")
        measure_reading(figures_of(keep, packages), args.debug)
        return
    packages = ("torch", "transformers", "deepspeed")
    if args.what == "curve":
        with tempfile.TemporaryDirectory() as folder:
            measure_curve(Path(folder) / "curve", figures_of(keep, packages), 4 if args.debug else 200)
        return
    if not args.debug and not torch.cuda.is_available():
        parser.error("gpu needs a CUDA device, and there is none; --debug trains two layers on the CPU")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", ALLOCATOR)  # torch reads it with the first tensor
    measure_families(args.mix, args.steps, figures_of(keep, packages), debug=args.debug)


def figures_of(keep: bool, packages: tuple[str, ...]) -> Figures:
    """Those of each word are added to the file: the other word's, of another machine, stay."""
    figures = Figures("families", keep=False, packages=packages)
    figures.command = " ".join(["python -m benchmarks.families", *sys.argv[1:]])
    figures.file = results_folder() / "families.jsonl" if keep else None
    return figures


def measure_reading(figures: Figures, debug: bool) -> None:
    """The figures of bytes read and frames decoded."""
    num_clips, seconds = (3, 8) if debug else (4, 64)
    with tempfile.TemporaryDirectory() as folder:
        media = Path(folder) / "media"
        media.mkdir()
        for clip in range(num_clips):
            write_clip(media / f"{clip}.mp4", seconds + clip, 2)  # of equal bytes they would be one clip
        print(f"{num_clips} clips drawn", flush=True)
        apart, together = (
            asked_for(Path(folder) / name, media, num_clips, share=share)
            for name, share in (("apart", False), ("together", True))
        )
    note = (
        f"{num_clips} clips of {seconds} frames and more, {RECORDS} records each; index and one virtual epoch"
    )
    ratios = {what: apart[what] / together[what] for what in ("frames", "bytes")}
    figures.add("family_decode_ratio", ratios["frames"], "times fewer frames", "higher", note, aim=5.0)
    figures.add("family_read_ratio", ratios["bytes"], "times fewer bytes", "higher", note, aim=5.0)


def asked_for(root: Path, media: Path, num_clips: int, *, share: bool) -> Counter[str]:
    """Bytes that were read and frames that were to be decoded: of the index pass and one virtual epoch."""
    write_tokenizer(root / "tokenizer")
    lines = []
    for clip in range(num_clips):
        for record in range(RECORDS):
            turns = [
                {"from": "human", "value": f"<video>\nQuestion {record}: what moves?"},
                {"from": "gpt", "value": f"A picture, number {record}."},
            ]
            lines.append(json.dumps({"video": f"{clip}.mp4", "conversations": turns}))
    (root / "records.jsonl").write_text("\n".join(lines) + "\n")
    write_shards(
        AnnotatedRecords((str(root / "records.jsonl"),), (media,)),
        root / "shards",
        max_samples=1000,
        max_bytes=10**9,
        skip_rejected=False,
        progress=lambda *_: None,
        share_media=share,
    )
    recipe = {"name": "clips", "about": "Clips.", "sources": [{"name": "clips", "shards": "shards"}]}
    (root / "recipe.yaml").write_text(json.dumps(recipe))
    cfg = _config(root, share)
    with counted() as found:
        data = open_data(cfg, tokenizer_dir=root / "tokenizer", held_out=False, build=True)
        last = data.plan.steps_in_epoch(0)
        where: dict[str, Any] = {"first": Cursor(), "last_step": last, "rank": 0, "dp_size": 1}
        samples = 0
        for step in train_steps(data, cfg, **where, ledger_path=root / "ledger.jsonl"):
            samples += sum(len(batch.sample_keys) - batch.num_failed_samples for batch in step.batches)
    assert samples == num_clips * RECORDS, f"{samples} samples of {num_clips * RECORDS}"
    print(f"{root.name}: {found['bytes']:,} bytes, {found['frames']:,} frames", flush=True)
    return found


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts what the index pass and the loader read and decode, in this process, within the block."""
    found: Counter[str] = Counter()
    places = [(build_index, "read_parts"), (shards_index, "read_parts")]
    originals = [getattr(place, name) for place, name in places]
    measure, render = Decoder.measure_records, Decoder.render_family

    def read_parts(*args: Any, **more: Any) -> dict[str, bytes]:
        parts: dict[str, bytes] = originals[0](*args, **more)
        found["bytes"] += sum(map(len, parts.values()))
        return parts

    def measure_records(self: Decoder, *args: Any, **more: Any) -> Any:
        answers = measure(self, *args, **more)
        if not isinstance(answers[0], SampleError):
            found["frames"] += sum(frames for frames, _, _ in answers[0][0].grids)
        return answers

    def render_family(self: Decoder, first: Any, *args: Any, **more: Any) -> Any:
        found["frames"] += sum(frames for frames, _, _ in first.planned.grids)
        return render(self, first, *args, **more)

    try:
        for place, name in places:
            setattr(place, name, read_parts)
        Decoder.measure_records, Decoder.render_family = measure_records, render_family  # type: ignore[method-assign]
        yield found
    finally:
        for (place, name), original in zip(places, originals, strict=True):
            setattr(place, name, original)
        Decoder.measure_records, Decoder.render_family = measure, render  # type: ignore[method-assign]


def _config(root: Path, share: bool) -> TrainConfig:
    return TrainConfig(
        stage=StageConfig(
            number=3,
            name="families",
            recipe=str(root / "recipe.yaml"),
            learning_rates={"projector": 1e-3},
            prune_frames=True,
        ),
        model=ModelConfig(name="debug"),
        data=DataConfig(root=str(root), num_workers=0, share_prefix=share, plan_cache=str(root / "plans")),
        step=StepConfig(max_tokens=16384, max_patches=65536, global_packs=1, max_samples=None),
        machine=MachineConfig(device=Device.cpu),
        run=RunConfig(output_dir=str(root / "run")),
    )


if __name__ == "__main__":
    main()
