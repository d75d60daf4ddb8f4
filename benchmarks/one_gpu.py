"""One GPU: useful work a second of real training steps, under the engine that users run.

    python -m benchmarks.one_gpu                       # every row
    python -m benchmarks.one_gpu --rows 2b stock_2b    # some of them
    python -m benchmarks.one_gpu --list
    python -m benchmarks.one_gpu --rows 2b --set gpu_gib=79.1   # on a larger GPU: with an 80 GB card's memory

Each row is a process of its own (one for each rank): the model with random weights, four packs a step on each GPU
through vl3train's collate, Zero and train_step (DeepSpeed, float32 masters and states, clipping), two steps to
warm up, the others timed by wall-clock, each on packs of its own. 2b_train_command times the whole training loop,
from JPEGs on disk. Rows of stock, liger and position_ids drive transformers' own forward over samples of the same
mix; 2b_plain_loop leaves DeepSpeed out. Useful work is vl3train.model.activations.flops: padding, recomputation and
the optimizer count nothing. JSON lines go to benchmarks/results/one_gpu.jsonl (or $OUT) as soon as a row is done, the
table as Markdown beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.measure import child, matmul_child
from benchmarks.gpu.process import in_own_processes
from benchmarks.gpu.rows import COMPARED, ROWS, Row, quick, tiny
from benchmarks.markdown import table_head, table_row

COLUMNS = ("useful TFLOP/s a GPU", "ms a pack", "tokens/s", "patches/s", "peak GiB", "recompiles")
UNITS = {
    "tflops": "TFLOP/s",
    "peak_gib": "GiB",
    "tokens_a_pack": "tokens",
    "recompiles": "",
    "graph_breaks": "",
    "data_wait_fraction": "",
}
SPELLED = {"host_syncs": ""}
"""The figure that keeps its own name, of the row that takes it."""


def results_folder() -> Path:
    """Where figures go: $OUT if set, else benchmarks/results."""
    return Path(os.environ.get("OUT") or Path(__file__).parent / "results")


def main() -> None:
    """Run rows, write figures, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument("--quick", action="store_true", help="one timed step a row; nothing is kept")
    parser.add_argument("--tiny", action="store_true", help="two-layer models on the CPU; nothing is kept")
    parser.add_argument("--profile", action="store_true", help="then benchmarks.profile on each row")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        type=setting,
        metavar="KEY=VALUE",
        help="change every row, as in --set memory=given recompute_vision=mlp steps=3",
    )
    parser.add_argument("--tag", default="", help="put behind every row's name")
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{name}: {row}" for name, row in ROWS.items()))
        return
    if not args.tiny and not torch.cuda.is_available():
        parser.error("rows need a CUDA device, and there is none; --tiny runs them small on the CPU")
    run_rows(args)
    if args.profile:
        from benchmarks.profile import profile_rows

        profile_rows(args.rows, tiny_model=args.tiny, folder=results_folder())


def run_rows(args: argparse.Namespace) -> None:
    """Every row in its turn; figures are written when a row is done."""
    keep = not (args.quick or args.tiny)
    out = results_folder() / "one_gpu.jsonl"
    table, done = [table_head("row", *COLUMNS, numbers=len(COLUMNS))], {}
    mode = "w" if args.rows == list(ROWS) else "a"  # a run of all rows stands for itself
    with (out if keep else Path(os.devnull)).open(mode, encoding="utf-8") as file:
        machine = "CPU" if args.tiny else "unknown"

        def put(line: dict[str, Any], shown: str) -> None:
            file.write(json.dumps({**line, "machine": machine, **origin()}) + "\n")
            file.flush()
            if not keep:
                print(json.dumps(line), flush=True)
            if shown:
                table.append(shown)
                print(shown, flush=True)

        if not args.tiny:
            found = in_own_processes(matmul_child, "matmul", Row(), False)
            machine = found.get("machine", machine)
            for figure, shown in (
                ("matmul_tflops", "8192^3"),
                ("matmul_tflops_lasting", "8192^3, for seconds"),
            ):
                value = found.get(figure)
                line = {"figure": figure, "value": value, "unit": "TFLOP/s", "better": "higher"}
                said = found["failed"] if value is None else f"{value:.0f}"
                put(
                    line if value is not None else {**line, **found},
                    short_row(f"matrix product of {shown}", said),
                )
        for name in args.rows:
            row, label = changed(ROWS[name], args), name + args.tag

            def write(found: dict[str, Any], row: Row = row, label: str = label) -> None:
                if "failed" in found:
                    line = {
                        "figure": figure_name(row, "tflops", label),
                        "value": None,
                        "failed": found["failed"],
                    }
                    put(line, short_row(label, found["failed"]))
                    return
                for number, line in enumerate(figure_lines(label, row, found)):
                    put(line, table_line(label, found) if number == 0 else "")

            found = run_row(label, row, args.tiny, write)
            if stopped := found.pop("stopped", ""):  # its figures are written, and no more rows run
                sys.exit(stopped)
            if "failed" not in found:
                done[name] = found
        for line in compared(done):
            put(line, short_row(line["figure"], f"{line['value']:.3f}"))
    if keep:
        out.with_suffix(".md").write_text("\n".join(table) + "\n", encoding="utf-8")
    print("\n".join(table))


def changed(row: Row, args: argparse.Namespace) -> Row:
    """The row with what the command line asks for."""
    row = quick(row) if args.quick else row
    row = tiny(row) if args.tiny else row
    return replace(row, **dict(args.set))


def setting(text: str) -> tuple[str, Any]:
    """A field of a row and its new value, out of ``key=value``; text as it is, all else as JSON."""
    key, _, value = text.partition("=")
    known = {one.name: one.type for one in fields(Row)}
    if key not in known:
        raise argparse.ArgumentTypeError(f"rows have no {key!r}; they have {', '.join(known)}")
    try:
        return key, value if known[key] == "str" else json.loads(value)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{key} takes {known[key]}, not {value!r}") from error


def run_row(name: str, row: Row, tiny_model: bool, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The row's figures, or why there are none; ``keep`` gets them first."""
    if not tiny_model and torch.cuda.device_count() < row.ranks:
        found = {"failed": f"needs {row.ranks} GPUs, here {torch.cuda.device_count()}"}
        keep(found)
        return found
    return in_own_processes(child, name, row, tiny_model, keep)


def figure_name(row: Row, key: str, label: str) -> str:
    """The issue's name of a row's figure, or the key with the row's name."""
    return row.figures.get(key, f"{key}_{label}")


def figure_lines(label: str, row: Row, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The JSON lines of one row."""
    settings = {key: value for key, value in asdict(row).items() if key != "figures"}
    full = {"settings": settings, "more": found}  # once, with the first
    for key, unit in {**UNITS, **SPELLED}.items():
        if found.get(key) is None:
            continue
        name = key if key in SPELLED else figure_name(row, key, label)
        better = "higher" if key in ("tflops", "tokens_a_pack") else "lower"
        line = {"figure": name, "value": found[key], "unit": unit, "better": better}
        if key == "host_syncs":
            line["note"] = "; ".join(f"{times} x {where}" for where, times in found["host_syncs_at"].items())
        if early := found.get("ended_early"):
            line["note"] = f"of {len(found['step_seconds'])} timed steps: {early}"
        yield {**line, "row": label, **full}
        full = {}


def compared(done: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Figures of several rows of this run."""
    for name, (ours, *theirs) in COMPARED.items():
        if {ours, *theirs} <= done.keys():
            best = max(theirs, key=lambda row: done[row]["tflops"])
            value = done[ours]["tflops"] / done[best]["tflops"]
            note = f"useful TFLOP/s of {ours} over {best}, same run"
            yield {"figure": name, "value": value, "unit": "", "better": "higher", "note": note}
    if "2b_given" in done and "2b_plain_loop" in done:
        plain, engine = (done[row]["seconds_a_pack"] for row in ("2b_plain_loop", "2b_given"))
        note = "share of the step's time that is gone under a loop of plain PyTorch: 1 - 2b_plain_loop / 2b_given"
        line = {"figure": "deepspeed_overhead", "value": 1 - plain / engine, "unit": "", "better": "lower"}
        yield {**line, "note": note}


def short_row(label: str, value: str) -> str:
    """A row of the Markdown table that has one value."""
    return table_row(label, value, *[""] * (len(COLUMNS) - 1))


def table_line(label: str, found: dict[str, Any]) -> str:
    """One row of the Markdown table."""
    peak = found.get("peak_gib")
    if early := found.get("ended_early"):
        label += f" (after {len(found['step_seconds'])} steps: {early})"
    return table_row(
        label,
        f"{found['tflops']:.4g}",
        f"{found['seconds_a_pack'] * 1e3:.0f}",
        f"{found['tokens_a_second']:.0f}",
        f"{found['patches_a_second']:.0f}",
        "" if peak is None else f"{peak:.1f}",
        found.get("recompiles", ""),
    )


def origin() -> dict[str, Any]:
    """Versions and command, for every line."""
    packages = ("torch", "transformers", "deepspeed")
    command = f"python -m benchmarks.one_gpu {' '.join(sys.argv[1:])}".strip()
    return {"versions": {name: version(name) for name in packages}, "command": command}


if __name__ == "__main__":
    main()
