"""Kill, break and damage runs on purpose, and count those that come out of it as they should.

    python -m benchmarks.reliability [--seed N] [--only kills|exceptions|faults] [--work DIR] [--side-by-side N]
        [--minutes N]

Two ranks with loader workers on the CPU, with the debug model and small data that it makes itself.

- kills: ``kill -9`` of a rank, of all processes, of the launcher, of a loader's worker, of a decode process or server,
  at random moments and at named ones in a save, an evaluation, a start. Then the same command is given again until the
  run is finished. It *survived* where all processes were gone after 60 s (a decode process is replaced), the lock was
  free, and the run's figures and last weights are bit for bit those of a run that was never killed.
- exceptions: raised everywhere, on each rank. It *ended* where all processes were gone after 60 s, the exit code was
  not 0, and the console ended with the cause.
- faults: damaged files, two runs at once, a storage that hangs, a folder that is moved, steps that are never finite.
  It was *told* where the console names the file or the cause and the run went on as if nothing had been, or was
  refused.

``--work DIR`` keeps what is done: the same command goes on from there. Figures are appended to
benchmarks/results/reliability.jsonl; with ``--only`` those of that part. ``--minutes N`` begins nothing new after that
time: they then count what was done by then, in random order.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.figures import RESULTS, machine
from benchmarks.kills.faults import FAULTS, copy_unfinished, try_fault
from benchmarks.kills.kills import chains, run_chain
from benchmarks.kills.place import RUN, finish, make_place
from benchmarks.markdown import table_head, table_row
from tests.engine.ends import ENDS, LOADED, MORE_ENDS, RESUMED, problem_of_end
from tests.engine.ends import RUN as ENDS_RUN

Line = dict[str, Any]


def main() -> int:
    """Do it all; returns 1 where something did not come out as it should."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["kills", "exceptions", "faults"])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--side-by-side", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=math.inf)
    args = parser.parse_args()
    folder = args.work or Path(tempfile.mkdtemp(prefix="vl3train-reliability-"))
    folder.mkdir(parents=True, exist_ok=True)
    place = make_place(folder)
    if not (folder / "straight" / "finished.json").exists() and (problem := finish(place, "straight")):
        raise RuntimeError(problem)
    straight = place.outcome("straight")

    def kills(number: int) -> list[Line]:
        return run_chain(place, f"kills-{number}", chains(args.seed)[number], straight, args.seed)

    words = [word for word in place.options() if word not in RUN]
    ends = [*ENDS, *MORE_ENDS, *RESUMED, LOADED]

    def exceptions(number: int) -> list[Line]:
        end, folder_of_end = ends[number], folder / f"end-{number}"
        own = [*words, *ENDS_RUN]
        shutil.rmtree(folder_of_end, ignore_errors=True)  # of this command, ended before it was done
        if end in (*RESUMED, LOADED):
            own = place.options()
            copy_unfinished(folder / "straight", folder_of_end / "run")
        problem = problem_of_end(place.python, end, own, folder_of_end)
        return [{"kill": f"{end[0]} on rank {end[1]}", "tried": True, "problem": problem}]

    def faults(number: int) -> list[Line]:
        return [try_fault(place, FAULTS[number], number, straight)]

    parts: dict[str, tuple[int, Callable[[int], list[Line]]]] = {
        "kills": (len(chains(args.seed)), kills),
        "exceptions": (len(ends), exceptions),
        "faults": (len(FAULTS), faults),
    }
    names = [name for name in parts if args.only in (None, name)]
    tasks = [(name, number) for name in names for number in range(parts[name][0])]
    random.Random(args.seed).shuffle(tasks)
    end = time.monotonic() + 60 * args.minutes

    def do(task: tuple[str, int]) -> list[Line]:
        return once(folder, *task, parts[task[0]][1], time_is_up=time.monotonic() > end)

    lines: dict[str, list[Line]] = {name: [] for name in names}
    with ThreadPoolExecutor(args.side_by_side) as pool:
        for (name, _), found in zip(tasks, pool.map(do, tasks), strict=True):
            lines[name] += [line for line in found if line["tried"]]
    return report(lines)


def once(
    folder: Path, name: str, number: int, act: Callable[[int], list[Line]], *, time_is_up: bool
) -> list[Line]:
    """``act(number)``, or what it gave when this command was started before; nothing where the time is up."""
    file = folder / f"{name}-{number}.json"
    if not file.exists():
        if time_is_up:
            return []
        file.write_text(json.dumps(act(number)))
    lines: list[Line] = json.loads(file.read_text())
    for line in lines:
        row = table_row(line["kill"], (line["problem"] or "as it should") if line["tried"] else "not reached")
        print(row + "\n", end="", flush=True)  # in one write: others print at the same time
    return lines


def report(lines: dict[str, list[Line]]) -> int:
    """Print and keep the figures; returns the exit code."""
    words = {"kills": "survived", "exceptions": "ended", "faults": "told"}
    about = {
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed")},
        "command": "python -m benchmarks.reliability",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(table_head("figure", "value", numbers=1))
    bad = [line for part in lines.values() for line in part if line["problem"]]
    for name, part in lines.items():
        good = sum(line["problem"] is None for line in part)
        for figure, value in ((f"{name}_tried", len(part)), (f"{name}_{words[name]}", good)):
            print(table_row(figure, value))
            line = {"figure": figure, "value": value, "unit": "1", "better": "higher", **about}
            with (RESULTS / "reliability.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
    for line in bad:
        print(f"\n{line['kill']}: {line['problem']}")
    return int(bool(bad))


def commit() -> str:
    """Of the code that is measured; empty outside a checkout."""
    words = ["git", "rev-parse", "--short=12", "HEAD"]
    done = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
