"""Figures of the data plane, one JSON line each.

python benchmarks/data_plane.py                 everything, about ten minutes
python benchmarks/data_plane.py --quick         less of everything
python benchmarks/data_plane.py --keep          write benchmarks/results/PART.jsonl, too
python benchmarks/data_plane.py --part plan     one part: plan, decode
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from a checkout

from benchmarks.data.plan import plan_figures
from benchmarks.figures import Figures


def decode_figures(figures: Figures, quick: bool) -> None:
    """What benchmarks/decode.py measures, in a process of its own: it times processes."""
    words = [sys.executable, "-m", "benchmarks.decode", *(["--quick"] if quick else [])]
    root = Path(__file__).resolve().parent.parent
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=root) as child:
        assert child.stdout is not None
        for line in child.stdout:
            figures.write({**json.loads(line), "command": figures.command})
    if child.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {child.returncode}")


PARTS: dict[str, tuple[Callable[[Figures, bool], None], tuple[str, ...]]] = {
    "plan": (plan_figures, ("numpy", "numba")),
    "decode": (decode_figures, ()),
}
"""What measures each part, and the packages whose versions matter to it."""


def main() -> None:
    """Measure the chosen parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--part", choices=sorted(PARTS), action="append")
    args = parser.parse_args()
    for name in args.part or sorted(PARTS):
        measure, packages = PARTS[name]
        measure(Figures(name, keep=args.keep, packages=packages), args.quick)


if __name__ == "__main__":
    main()
