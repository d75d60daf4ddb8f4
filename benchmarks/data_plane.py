"""Figures of the data plane, one JSON line each.

python benchmarks/data_plane.py                 everything, about five minutes
python benchmarks/data_plane.py --quick         under a minute: fewer samples and steps
python benchmarks/data_plane.py --keep          write benchmarks/results/data_plane.PART.jsonl, too
python benchmarks/data_plane.py --part plan     one part
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from a checkout

from benchmarks.figures import Figures
from benchmarks.plane_plan import plan_figures

PARTS: dict[str, tuple[Callable[[Figures, bool], None], tuple[str, ...]]] = {
    "plan": (plan_figures, ("numpy", "numba")),
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
        measure(Figures(f"data_plane.{name}", keep=args.keep, packages=packages), args.quick)


if __name__ == "__main__":
    main()
