"""benchmarks/README.md from benchmarks/results/*.jsonl: ``python benchmarks/table.py``; ``--check`` only compares."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

AIMS = {
    "images_per_second_core": 120,
    "images_vs_hf_ratio": 4,
    "stored_frames_per_second_core": 500,
    "data_wait_share": 0.05,
    "useful_tflops_2b": 475,
    "useful_tflops_2b_train_command": 475,
    "useful_tflops_7b": 500,
    "useful_tflops_7b_train_command": 500,
    "ratio_to_stock_stage1": 7,
    "ratio_to_stock_stage1_as_shipped": 7,
    "useful_tflops_7b_lora": 450,
    "longest_pack_2b": 131072,
    "longest_pack_7b_lora": 65536,
    "deepspeed_overhead": 0.05,
    "data_wait_fraction_2b_train_command": 0.05,
    "data_wait_fraction_7b_train_command": 0.05,
    "host_syncs": 1,
}
"""Of figures that do not carry their own."""

KNOWN = {"figure", "value", "unit", "better", "aim", "reached", "note", "machine", "versions", "command"}
LONG = {"settings", "more", "row"}
"""What the results file keeps in full and the page leaves out."""

ROWS_HEAD = (
    "| row | useful TFLOP/s a GPU | aim | ms a pack | tokens/s | patches/s | peak GiB | recompiles | steps | machine |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
)
IN_ROWS = ("peak_gib_", "tokens_a_pack_", "recompiles_", "graph_breaks_")
"""Figures of a row that the table of rows has; ``recompiles`` itself is a figure of its own."""

FOLDER = Path(__file__).resolve().parent
HEAD = """# Figures

Made by `python benchmarks/table.py` from `results/*.jsonl`, which the commands below wrote. Scripts take `--quick`, or
`--tiny` where they train (two layers, on a CPU), for a short run that keeps nothing. Aims are those of the project's
issues; a figure without one is there to compare with. What was tried on the GPU, predicted and missed stands in
[log.md](log.md); `vl3train kernels --check` compares the kernels of a machine with float64 and prints its
table. `python -m benchmarks.profile` tells where the time of a step goes. [docs/numerics.md](../docs/numerics.md) says
what the loss curves mean.
"""


def table() -> str:
    """The whole page: for each results file its machine, command, versions and figures, rows of the GPU in a table."""
    parts = [HEAD]
    for file in sorted((FOLDER / "results").glob("*.jsonl")):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        figures, faults = [[line for line in lines if key in line] for key in ("figure", "fault")]
        first = next(line for line in figures if "versions" in line)
        versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
        command = first.get("command", f"python -m benchmarks.{file.stem}")
        parts += [f"\n## {file.stem}\n", f"`{command}` on {first['machine']}; {versions}.\n"]
        if rows := [line for line in figures if "seconds_a_pack" in line.get("more", {}) and _is_speed(line)]:
            parts += [*ROWS_HEAD, *map(_gpu_row, rows), ""]
            figures = [line for line in figures if not line["figure"].startswith(IN_ROWS)]
        parts += ["| figure | value | unit | better | aim | what |", "|---|---:|---|---|---|---|"]
        parts += [_row(line, first["machine"]) for line in figures]
        if faults:
            parts += [
                "\n### Planted faults\n",
                "| fault | samples | used | refused | what is said |",
                "|---|---:|---:|---:|---|",
            ]
            parts += [
                f"| {line['fault']} | {line['samples']} | {line['used']} | {line['refused']} | {_cell(line['said'])} |"
                for line in faults
            ]
    return "\n".join(parts) + "\n"


def _is_speed(line: dict[str, Any]) -> bool:
    return line["figure"].removeprefix("useful_").startswith("tflops_")


def _gpu_row(line: dict[str, Any]) -> str:
    """A row of benchmarks/one_gpu.py in one line; what it was taken with stands in the figures below."""
    name, more = line["figure"].removeprefix("useful_").removeprefix("tflops_"), line["more"]
    if line["figure"].startswith("useful_"):
        name = line["row"]  # the name of the figure may leave out how it was had
    peak, aim = more["peak_gib"], AIMS.get(line["figure"], "")
    gpus = f"{ranks} x " if (ranks := line.get("settings", {}).get("ranks", 1)) > 1 else ""
    return (
        f"| {name} | {line['value']:.4g} | {aim} | {more['seconds_a_pack'] * 1e3:,.0f} | "
        f"{more['tokens_a_second']:,.0f} | {more['patches_a_second']:,.0f} | "
        f"{'' if peak is None else f'{peak:.1f}'} | {more.get('recompiles', '')} | {len(more['step_seconds'])} | "
        f"{gpus}{line['machine'].removeprefix('NVIDIA ').partition(' ')[0]} |"
    )


def _row(line: dict[str, Any], machine: str) -> str:
    if line["value"] is None:
        return f"| {line['figure']} | none | | | | {_cell(line.get('failed', line.get('note', '')))} |"
    aim = line.get("aim", AIMS.get(line["figure"]))
    reached = ""
    if aim is not None:
        met = line["value"] <= aim if line["better"] == "lower" else line["value"] >= aim
        reached = f"{aim:g}, {'reached' if met else '**not reached**'}"
    more = [f"{key} {value}" for key, value in line.items() if key not in KNOWN | LONG]
    elsewhere = [f"on {line['machine']}"] if line.get("machine", machine) != machine else []
    what = _cell("; ".join([*elsewhere, *([line["note"]] if line.get("note") else []), *more]))
    return f"| {line['figure']} | {line['value']:,.4g} | {line['unit']} | {line['better']} | {reached} | {what} |"


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def main() -> int:
    """Write the page, or say whether it is up to date."""
    page = FOLDER / "README.md"
    if "--check" in sys.argv[1:]:
        current = page.exists() and page.read_text(encoding="utf-8") == table()
        print("up to date" if current else "out of date: run `python benchmarks/table.py`")
        return int(not current)
    page.write_text(table(), encoding="utf-8")
    print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
