"""Seconds from the command to the end of the first optimizer step, and where they go.

    python -m benchmarks.start --rows debug_cpu index                       # this build
    python -m benchmarks.start --rows 2b_cold 2b_warm --beside 2419156      # beside an older one, a commit or a folder
    python -m benchmarks.start --rows 2b_warm --only beside --beside DIR    # the older one alone

Rows are those of starts/rows.py. ``..._warm`` and ``debug_...`` start once untimed, unless ``2b_cold`` did so.
Each build has folders of its own for what is compiled, checked and indexed. Rows of one call share ``--work``;
giving it again saves the drawing of data and weights. Figures go to benchmarks/results/start.jsonl with ``--keep``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.figures import RESULTS, Figures
from benchmarks.starts.rows import ROWS, row_data
from benchmarks.starts.timed import common_places, start_once, timeline

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Run the rows, print timelines and figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", nargs="+", default=["debug_cpu", "index"], choices=list(ROWS), metavar="ROW"
    )
    parser.add_argument("--beside", metavar="BUILD", help="an older build: a commit, or a folder")
    parser.add_argument("--only", choices=("this", "beside"), help="one of the two builds")
    parser.add_argument("--limit", type=float, default=300.0, metavar="SECONDS", help="of one start")
    parser.add_argument(
        "--work", type=Path, help="folder for data, runs and caches (default: a new one, deleted)"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the figures in benchmarks/results/start.jsonl"
    )
    args = parser.parse_args()
    figures = Figures("start", keep=False, packages=("torch", "deepspeed", "transformers"))
    figures.machine = "; ".join([*gpu_names(), figures.machine])
    with tempfile.TemporaryDirectory(prefix="vl3train-start-") as temporary:
        work = (args.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        builds = {"this": ROOT, **({"beside": build_of(args.beside, work)} if args.beside else {})}
        for name in args.rows:
            for side, build in builds.items():
                if args.only in (None, side):
                    line = measure(name, side, build, work, args.limit, figures)
                    if args.keep and line is not None:
                        keep(line)


def gpu_names() -> list[str]:
    """Of the GPUs here. This process must not ask torch: that takes memory of the GPU, which a run would miss."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return []
    query = [tool, "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, check=False, capture_output=True, text=True).stdout.strip().splitlines()


def keep(line: dict[str, Any]) -> None:
    """Put the line of a figure into the file, in the place of an earlier one: rows are run in calls of their own."""
    file = RESULTS / "start.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    lines = [text for text in lines if json.loads(text)["figure"] != line["figure"]]
    file.write_text("\n".join([*lines, json.dumps(line), ""]), encoding="utf-8")


def build_of(name: str, work: Path) -> Path:
    """The folder of an older build; its files are put into ``work`` where ``name`` is a commit."""
    if Path(name).is_dir():
        return Path(name).resolve()
    folder = work / f"build-{name}"
    if not folder.exists():
        folder.mkdir()
        files = subprocess.run(["git", "-C", str(ROOT), "archive", name], check=True, stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", str(folder)], input=files.stdout, check=True)
    return folder


def measure(
    name: str, side: str, build: Path, work: Path, limit: float, figures: Figures
) -> dict[str, Any] | None:
    """One row of one build: its starts, its timeline, and the line of its figure, if there is one."""
    row = ROWS[name]
    words = row_data(row, work)
    caches = work / f"caches-{side}-{row.data}"

    def start(number: int) -> float | None:
        folder = work / f"{name}-{side}-{number}"
        while folder.exists():
            folder = folder.with_name(f"{folder.name}-again")
        indexes = (folder if row.new_index else caches) / "indexes"
        started = start_once(build, words, folder, caches, indexes=indexes, ranks=row.ranks, limit=limit)
        what = "no first step" if started.seconds is None else f"first step after {started.seconds:.1f} s"
        print(f"\n## {name}, {side} build, start {number}: {what}\n", *timeline(started), "", sep="\n")
        print(*common_places(started), sep="\n")
        print(
            "\nits lines:",
            *(f"{at:7.1f} s  {line}" for at, line in started.lines[-60:]),
            sep="\n",
            flush=True,
        )
        return started.seconds if row.phase is None else started.phase_seconds(row.phase)

    warm = caches / "warm"
    if row.cold and caches.exists():
        sys.exit(f"{caches} is there already: {name} would not be cold; give another --work")
    if not row.cold and not warm.exists() and start(0) is not None:
        warm.touch()
    seconds = start(1)
    if seconds is None:
        return None
    warm.touch()
    figure = row.figure if side == "this" else f"{row.figure}_before"
    note = "one start" if side == "this" else f"the build in {build.name}"
    aim = row.aim if side == "this" else None
    return figures.add(figure, round(seconds, 2), "s", "lower", note=note, aim=aim)


if __name__ == "__main__":
    main()
