"""Answers a second from files on disk: vl3train's generation beside transformers' generate, on one model and files.

    python -m benchmarks.generate --rows cpu              # the debug model on the CPU
    python -m benchmarks.generate --rows images clips     # the 2B on a GPU
    python -m benchmarks.generate --rows cpu --questions 8 --no-keep

A row draws pictures or clips, writes shards of them, and a model with random weights. Eight questions ask about each
picture or clip; in the rows that end with _apart each has a picture of its own. vl3train reads the shards through its
loader workers, encodes and prefills what questions share once, and decodes with a cache of many slots. transformers
reads the files in as many loader workers and answers batches, padded on the left, with a dynamic cache and, on a GPU,
with a static one, for which it compiles its decoding step (untimed); batch sizes double while that is faster and memory
is there, and the best counts. Every answer has the same number of tokens; no token ends one. In float32 both give the
same ids, and the row fails where they do not. Both sides run a few questions first, untimed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

ROWS = ("images", "images_apart", "clips", "cpu", "cpu_apart")


def main() -> None:
    """Compare, print, keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["cpu"])
    parser.add_argument("--questions", type=int, help="other than the row's number of questions")
    parser.add_argument("--workers", type=int, default=2, help="loader workers of both sides (default: 2)")
    parser.add_argument("--no-keep", action="store_true", help="print the figures only")
    args = parser.parse_args()

    # Here and not above: loader workers import this module anew, and would import all of it.
    from benchmarks.figures import Figures
    from benchmarks.generation import WORK, compare

    figures = Figures("generate", keep=not args.no_keep, packages=("torch", "transformers"))
    for name in args.rows:
        row = WORK[name]
        if args.questions is not None:
            row = replace(row, num_questions=args.questions)
        compare(name, row, args.workers, figures)


if __name__ == "__main__":
    main()
