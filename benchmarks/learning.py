"""What models learn: tasks with known answers, the four stages from scratch, ablations, wrong data.

    python -m benchmarks.learning prepare            # data, tokenizer, language model on words, random encoders
    python -m benchmarks.learning train              # the four stages with each seed, side by side
    python -m benchmarks.learning ablation NAME ...  # beside `full`, with the same seeds
    python -m benchmarks.learning wrong-data NAME ...
    python -m benchmarks.learning evaluate           # the figures of all runs that are there

``--scale small`` is for a GPU and is what the figures are about; ``tiny`` learns the easy tasks on one CPU core;
``debug`` shows that everything runs. The same words go on where a stop left off. Figures go to
benchmarks/results/learning.jsonl (or $OUT), but of ``debug``. docs/learning.md has the design.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.lessons.figures import write_figures
from benchmarks.lessons.parts import SIZES, make_parts
from benchmarks.lessons.runs import SCALES, Place, index, train_all
from benchmarks.lessons.variants import ABLATIONS, VARIANTS, WRONG
from benchmarks.lessons.write import write_data

DATA_SEED = 0


def main() -> None:
    """One word of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("word", choices=("prepare", "train", "ablation", "wrong-data", "evaluate"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join([*ABLATIONS, *WRONG])}")
    parser.add_argument("--scale", choices=list(SCALES), default="small")
    parser.add_argument("--debug", action="store_true", help="the same as --scale debug")
    parser.add_argument("--root", type=Path, default=Path("learning"), help="folder for data and runs")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 on")
    parser.add_argument("--at-a-time", type=int, default=None, help="runs side by side (default: all seeds)")
    parser.add_argument("--device", default="cpu", help="where the language model learns words: cpu or cuda")
    args = parser.parse_args()
    scale = "debug" if args.debug else args.scale
    place = Place(root=args.root.resolve() / scale, scale=SCALES[scale])
    allowed = {"ablation": ABLATIONS, "wrong-data": WRONG}.get(args.word, {})
    if unknown := [name for name in args.names if name not in allowed]:
        parser.error(
            f"{args.word} knows no {', '.join(unknown)}; there are {', '.join(allowed) or 'no names'}"
        )
    if allowed and not args.names:
        parser.error(f"{args.word} needs a name: {', '.join(allowed)}")
    began = time.perf_counter()
    if args.word != "evaluate":
        prepare(place, args.seeds, args.device)
    if args.word not in ("prepare", "evaluate"):
        names = args.names or ["full"]
        for name in names:
            prepare_changes(place, name)
        wanted = [(name, seed) for name in names for seed in range(args.seeds)]
        train_all(place, wanted, args.at_a_time or len(wanted))
    print(f"{args.word}: {time.perf_counter() - began:.0f} s", flush=True)
    if args.word != "prepare":
        write_figures(place, keep=scale != "debug")


def prepare(place: Place, seeds: int, device: str) -> None:
    """Data and parts, as far as they are missing."""
    scale = place.scale
    counts = {"train": scale.train, "same": scale.held_out, "new": scale.held_out}
    began = time.perf_counter()
    written = write_data(place.data, counts, DATA_SEED)
    print(f"{written} samples in {time.perf_counter() - began:.0f} s", flush=True)
    if not (place.data / "parts").is_dir():
        make_parts(place.data / "parts", SIZES[scale.parts], seeds, device)
    if written:
        index(place, "full")
    print(f"prepared after {time.perf_counter() - began:.0f} s", flush=True)


def prepare_changes(place: Place, name: str) -> None:
    """The shards that a variant has for itself."""
    variant, scale = VARIANTS[name], place.scale
    written = 0
    if variant.changed_train:
        written = write_data(place.data, {"train": scale.train}, DATA_SEED, variant.changed_train)
    if variant.changed_held_out:
        counts = {"same": scale.held_out, "new": scale.held_out}
        written += write_data(place.data, counts, DATA_SEED, variant.changed_held_out)
    if written:
        index(place, name)


if __name__ == "__main__":
    main()
