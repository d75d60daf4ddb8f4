"""Where the time of a step goes: one row's step under torch.profiler.

    python -m benchmarks.profile --row 2b              # trace and table to benchmarks/results, or $OUT
    python -m benchmarks.profile --row 2b --tiny       # two layers, on the CPU
    python -m benchmarks.profile --row 7b_one_gpu --packs 4 --steps 6 --step 3   # the step that a row of six printed

Writes profile_ROW.trace.json.gz (open it in https://ui.perfetto.dev), profile_ROW.json and profile_ROW.md. Times are
of kernels on the GPU, of operations less their callees on a CPU. Idle is the step's wall-clock less the union of
kernels and copies; the longest stretches without a kernel are listed with what the host did meanwhile. Under the
profiler a step is slower than without; the shares are what to read.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.gaps import gaps
from benchmarks.gpu.measure import WARM_UP_STEPS, prepare, send, wait_for_all
from benchmarks.gpu.process import in_own_processes
from benchmarks.gpu.rows import ROWS, Row, tiny
from benchmarks.kernels.kinds import UNMATCHED, kind_of, union_seconds
from benchmarks.markdown import table_head, table_row

PACKS, STEPS = 2, 1
TOP = 15
SECONDS_TO_WRITE = 180.0
"""More than a row has otherwise: a trace of a step is some hundred megabytes before it is packed."""
GPU_EVENTS = {"kernel", "gpu_memcpy", "gpu_memset"}


def main() -> None:
    """Profile one row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--row",
        default="2b",
        metavar="ROW",
        choices=[name for name, row in ROWS.items() if row.way != "command"],
        help="one that benchmarks.one_gpu --list names, but for those of the train command",
    )
    parser.add_argument("--tiny", action="store_true", help="a two-layer model on the CPU")
    parser.add_argument(
        "--packs", type=int, default=PACKS, help="packs in the profiled step: a trace of four is large"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=STEPS,
        help="that the row times: packs are drawn for all of them together",
    )
    parser.add_argument(
        "--step", type=int, help="which is profiled, by the number that a row prints; left out: the last"
    )
    args = parser.parse_args()
    if args.step is not None and not 0 <= args.step < WARM_UP_STEPS + args.steps:
        parser.error(
            f"--step {args.step}: with --steps {args.steps} there are 0 to {WARM_UP_STEPS + args.steps - 1}"
        )
    if not args.tiny and not torch.cuda.is_available():
        parser.error("rows need a CUDA device, and there is none; --tiny profiles them small on the CPU")
    folder = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
    profile_rows(
        [args.row], tiny_model=args.tiny, folder=folder, packs=args.packs, steps=args.steps, step=args.step
    )


def profile_rows(
    names: Sequence[str],
    *,
    tiny_model: bool,
    folder: Path,
    packs: int = PACKS,
    steps: int = STEPS,
    step: int | None = None,
) -> None:
    """Profile rows one after the other, each in processes of its own; a row that fails prints its reason.

    ``step`` of a row with ``steps`` timed ones, the last if it is left out.
    """
    profiled = WARM_UP_STEPS + steps - 1 if step is None else step
    for name in names:
        row = tiny(ROWS[name]) if tiny_model else ROWS[name]
        row = replace(row, packs_a_step=packs, steps=steps, max_seconds=row.max_seconds + SECONDS_TO_WRITE)
        if row.way == "command":
            print(f"{name}: the command runs in a process of its own, which is not profiled")
            continue
        found = in_own_processes(partial(child, folder, profiled), name, row, tiny_model)
        print(found["table"] if "table" in found else f"{name}: {found['failed']}", flush=True)


def child(folder: Path, profiled: int, name: str, row: Row, rank: int, tiny_model: bool, pipe: Any) -> None:
    """In a process of its own: profile, write, send the table."""
    device = torch.device("cpu") if tiny_model else torch.device("cuda", rank)
    send(pipe, lambda: profile_row(name, row, rank, device, folder, profiled))


def profile_row(
    name: str, row: Row, rank: int, device: torch.device, folder: Path, profiled: int
) -> dict[str, Any]:
    """Run the steps up to ``profiled``, profile it, write trace, JSON and Markdown (rank 0); returns the table."""
    step, work = prepare(row, rank, device)
    for number in range(profiled):
        step(work.data(number), work.steps[number]["supervised"])
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    wait_for_all(device)
    with torch.profiler.profile(activities=kinds) as profiler:
        started = time.perf_counter()
        step(work.data(profiled), work.steps[profiled]["supervised"])
        wait_for_all(device)
        wall = time.perf_counter() - started
    if rank:
        return {"table": ""}
    trace = folder / f"profile_{name}.trace.json.gz"
    profiler.export_chrome_trace(str(trace))
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    found = {"row": name, "packs": row.packs_a_step, **summary(events, wall)}
    table = markdown(found)
    (folder / f"profile_{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / f"profile_{name}.md").write_text(table)
    return {"table": table}


def summary(events: Iterable[dict[str, Any]], wall: float) -> dict[str, Any]:
    """Seconds of each kind, idle time and what was not matched, from a trace's events (microseconds)."""
    complete = [event for event in events if event.get("ph") == "X"]
    on_gpu = [event for event in complete if event.get("cat") in GPU_EVENTS]
    spent = gpu_times(on_gpu) if on_gpu else self_times(e for e in complete if e.get("cat") == "cpu_op")
    by_kind: dict[str, list[float]] = defaultdict(list)
    by_name: dict[str, list[float]] = defaultdict(list)
    for name, seconds in spent:
        by_kind[kind_of(name)].append(seconds)
        by_name[name].append(seconds)
    busy = union_seconds((e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6) for e in on_gpu) if on_gpu else None
    total = sum(map(sum, by_kind.values()))
    ranked = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    unmatched = [item for item in ranked if kind_of(item[0]) == UNMATCHED]
    return {
        "wall_seconds": wall,
        "kernel_seconds": total,
        "idle_seconds": None if busy is None else wall - busy,
        "unmatched_share": sum(by_kind.get(UNMATCHED, [])) / total if total else 0.0,
        "kinds": {
            k: {"seconds": sum(v), "calls": len(v)}
            for k, v in sorted(by_kind.items(), key=lambda i: -sum(i[1]))
        },
        "top": [
            {"name": n[:160], "kind": kind_of(n), "seconds": sum(v), "calls": len(v)} for n, v in ranked[:40]
        ],
        "unmatched": [{"name": n[:160], "seconds": sum(v), "calls": len(v)} for n, v in unmatched[:TOP]],
        "gaps": gaps(complete)[:TOP],
    }


def gpu_times(events: Iterable[dict[str, Any]]) -> list[tuple[str, float]]:
    """Name and seconds of each kernel, copy and fill."""
    return [(event["name"], event["dur"] / 1e6) for event in events]


def self_times(events: Iterable[dict[str, Any]]) -> list[tuple[str, float]]:
    """Name and seconds of each operation, less those that it called on its thread."""
    times: list[tuple[str, float]] = []
    by_thread: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        by_thread[event["tid"]].append(event)
    for thread in by_thread.values():
        stack: list[list[Any]] = []  # end, name, seconds of its own
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            while stack and stack[-1][0] <= event["ts"]:
                times.append((stack[-1][1], stack.pop()[2]))
            if stack:
                stack[-1][2] -= event["dur"] / 1e6
            stack.append([event["ts"] + event["dur"], event["name"], event["dur"] / 1e6])
        times += [(name, seconds) for _, name, seconds in stack]
    return times


def markdown(found: dict[str, Any]) -> str:
    """The tables of one row."""
    wall = found["wall_seconds"]
    lines = [
        f"## Where the time of a step goes: {found['row']}, {found['packs']} packs, {wall * 1e3:.0f} ms\n"
    ]
    lines.append(table_head("kind", "ms", "share of the step", "calls", numbers=3))
    for kind, of_kind in found["kinds"].items():
        seconds = of_kind["seconds"]
        lines.append(table_row(kind, f"{seconds * 1e3:.1f}", f"{seconds / wall:.1%}", of_kind["calls"]))
    if found["idle_seconds"] is not None:
        idle = found["idle_seconds"]
        lines.append(table_row("idle: no kernel runs", f"{idle * 1e3:.1f}", f"{idle / wall:.1%}", ""))
    for title, key in (("Longest", "top"), ("Not matched", "unmatched")):
        shown = found[key][:TOP]
        if key == "unmatched":
            lines.append(f"\nNot matched: {found['unmatched_share']:.1%} of the kernels' time.")
        if shown:
            lines.append("\n" + table_head(title.lower(), "kind", "ms", "calls", numbers=2))
        for one in shown:
            ms = f"{one['seconds'] * 1e3:.2f}"
            lines.append(table_row(f"`{one['name']}`", one.get("kind", ""), ms, one["calls"]))
    if found["gaps"]:
        lines.append("\n" + table_head("ms without a kernel", "at", "before", "the host meanwhile"))
    for gap in found["gaps"]:
        at = f"{gap['at_ms']:.0f} ms"
        lines.append(table_row(f"{gap['ms']:.1f}", at, f"`{gap['before']}`", gap["host"]))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
